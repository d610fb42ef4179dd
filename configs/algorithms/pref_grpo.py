"""Pref-GRPO on the bundled model: `configs/shapes.py` with another reward.

    python -m flowgrpo_jax.train --config algorithms/pref_grpo

An image's reward is the share of the other images of its prompt that it beats, with the verifier's
graded score as the judge of each pair, in place of the paper's vision-language model. On real
models `preference` asks such a judge.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-pref-grpo"
    c.reward.weights = ConfigDict({"shapes_wins": 1.0})
    return c
