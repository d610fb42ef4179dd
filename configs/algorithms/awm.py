"""Advantage-weighted matching on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/awm

The images are drawn by the plain ODE in 14 steps, as in the paper, and trained at six noise levels
each.
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
            "share": 0.9,
            "power": 0.25,
            "advantage_scale": 0.2,
            "clip_range": 0.0,
            "kl_beta": 1e-3,
            "anchor_beta": 1.0,
            "anchor_rate": 1e-3,
            "anchor_most": 0.3,
        }
    )
    c.sample.steps = 14
    return c
