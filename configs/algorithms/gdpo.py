"""GDPO on the bundled model: `configs/shapes.py` with two rewards, each normalised by itself.

    python -m flowgrpo_jax.train --config algorithms/gdpo

It differs from `configs/shapes.py` in its rewards and in one option, `advantage.name="gdpo"`: each
reward is divided by its own standard deviation within a group, and their sum by its own over the
batch (arXiv 2601.05242). The second reward is whether the picture has the prompt's colours, which
the first one judges together with shapes, numbers and places. Before training their standard
deviations within a group are 0.3 for `shapes` and 0.13 for `shapes_colors`: in a plain sum
(`advantage.name="group"`) the first would have more than twice the say, and here both have the
same. The paper trains language models; the two equal weights are those of its first experiment.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-gdpo"
    c.reward.weights = ConfigDict({"shapes": 1.0, "shapes_colors": 1.0})
    c.advantage.name = "gdpo"
    c.eval.rewards = ("shapes", "shapes_strict", "shapes_unknown", "shapes_colors")
    return c
