"""Reward-weighted regression on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/rwr

Each image weighted by exp(A), and one draw of noise. The images are drawn by the ODE in 20 steps,
whose noise levels are trained.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-rwr"
    c.algorithm.name = "rwr"
    c.algorithm.options = ConfigDict(
        {
            "temperature": 1.0,
            "weighting": "exp",
            "levels": 1,
            "kl_beta": 0.0,
        }
    )
    c.sample.steps = 20
    return c
