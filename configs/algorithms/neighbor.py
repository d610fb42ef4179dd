"""Neighbor GRPO on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/neighbor

Groups of 12, 4 anchors, 4 steps, the noise's spread of 0.3 and the quasi-norm are the paper's, and
so is the solver, DPM-Solver++ in 8 steps.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-neighbor"
    c.algorithm.name = "neighbor"
    c.algorithm.options = ConfigDict({"anchors": 4, "steps": 4, "clip_range": 0.0})
    c.advantage.name = "quasi_norm"
    c.sample.steps, c.sample.solver = 8, "dpmpp_2m"
    c.sample.neighbor_noise = 0.3
    return c
