"""Advantage-weighted matching on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/awm

The images are drawn by the plain ODE in 14 steps, where the paper's solver adds some noise, and
trained at six noise levels each. Advantages are divided by the standard deviation of all rewards of
an epoch, as in the paper. The EMA keeps 0.97 of itself, for its 0.99, because a run is short.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-awm"
    c.algorithm.name = "awm"
    c.algorithm.options = ConfigDict(
        {
            "levels": 6,
            "first": 1,
            "share": 0.9,
            "power": 0.25,
            "advantage_scale": 0.2,
            "clip_range": 0.0,
            "kl_beta": 3e-3,
            "anchor_beta": 1.0,
            "anchor_rate": 1e-3,
            "anchor_most": 0.3,
        }
    )
    c.advantage.name = "global"
    c.sample.steps = 14
    return c
