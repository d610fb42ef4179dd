"""Flash-GRPO on the model in the box: `configs/shapes.py` with other options.

    python -m flowgrpo_jax.train --config algorithms/flash_grpo

One step an epoch is trained, of the first ten of 20, with the paper's kernel and weights. All
groups of an epoch share the step, and in the paper each prompt has its own. The clip range is that
of `configs/shapes.py`.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-flash-grpo"
    c.sample.kernel, c.sample.noise_level = "flash", 1.0
    c.sample.window, c.sample.window_range = 10, (0, 10)
    c.algorithm.options.steps = 1
    c.algorithm.options.step_weight = "flash"
    return c
