"""TempFlow-GRPO on the model in the box: `configs/shapes.py` with one branch step an epoch.

    python -m flowgrpo_jax.train --config algorithms/tempflow

The images of a prompt follow one path of the ODE up to the branch step, take a stochastic step
there, each with its own noise, and go on by the ODE: their scores differ by that step alone. The
paper (arXiv 2508.04324) has 6 branches of 4 paths at every step; here an epoch has 12 branches of
one path at one step, which is drawn for all prompts.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-tempflow"
    c.algorithm.options.step_weight = "tempflow"
    c.sample.branches = 0  # all of a group
    c.sample.window, c.sample.window_range = 1, (0, 10)
    return c
