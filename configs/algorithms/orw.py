"""ORW-CFM-W2 on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/orw

Each image weighted by exp(A), held by the full distance of the paper, alpha 1. The images are drawn
by the ODE in 20 steps; four noise levels of an image are trained.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-orw"
    c.algorithm.name = "orw"
    c.algorithm.options = ConfigDict(
        {
            "temperature": 1.0,
            "alpha": 1.0,
            "levels": 4,
        }
    )
    c.sample.steps = 20
    return c
