"""V-GRPO on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/vgrpo

The first stage of the paper, strictly on policy, with the ODE of 40 steps and 4 noise levels that a
group shares. There are 24 groups of 12 images in place of 48 of 24.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-vgrpo"
    c.algorithm.name = "vgrpo"
    c.algorithm.options = ConfigDict(
        {
            "levels": 4,
            "soft_clip": 3.0,
            "clip_range": 0.0,
            "kl_beta": 0.0,
        }
    )
    c.sample.steps = 40
    return c
