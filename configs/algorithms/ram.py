"""Reinforce adjoint matching on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/ram

The texts on the paper name no figures for the schedule: the images are drawn by the ODE in 14
steps, as for AWM, of which this algorithm is a special case.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-ram"
    c.algorithm.name = "ram"
    c.algorithm.options = ConfigDict(
        {
            "levels": 4,
            "share": 0.9,
            "scale": 1.0,
        }
    )
    c.sample.steps = 14
    return c
