"""DGPO on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/dgpo

As in the paper the images are drawn by DPM-Solver++ in 10 steps, and 4 noise levels of the first 5
are trained, which is its choice for GenEval. The average draws the images from the 200th step on,
as in the recipes other than GenEval's, because a run has 400 steps. Groups have 12 images in place
of 16, and there is no guidance.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-dgpo"
    c.algorithm.name = "dgpo"
    c.algorithm.options = ConfigDict(
        {
            "levels": 4,
            "first_steps": 5,
            "beta": 100.0,
            "clip_range": 0.01,
            "kl_beta": 0.02,
            "average_rate": 0.001,
            "average_most": 0.3,
            "average_after": 200,
        }
    )
    c.sample.steps, c.sample.solver = 10, "dpmpp_2m"
    return c
