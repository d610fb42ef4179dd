"""Flash-GRPO on the bundled model: `configs/shapes.py` with other options.

    python -m flowgrpo_jax.train --config algorithms/flash_grpo

One step of each image is stochastic and trained, of the first ten of 20, with the paper's kernel
and weights. The images of a prompt share the step, and each prompt has its own (arXiv 2605.15980).
The clip range is that of `configs/shapes.py`, the paper's is 1e-3.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-flash-grpo"
    c.sample.kernel, c.sample.noise_level = "flash", 1.0
    c.sample.window, c.sample.window_range = 1, (0, 10)
    c.sample.groups, c.sample.group_size, c.sample.micro_batch = 18, 16, 16
    c.sample.windows = c.sample.groups
    c.algorithm.options.step_weight = "flash"
    return c
