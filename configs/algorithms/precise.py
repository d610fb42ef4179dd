"""Precise on the bundled model: `configs/shapes.py` with noise in most steps, by the exact kernel.

    python -m flowgrpo_jax.train --config algorithms/precise

The step of Flow-GRPO's SDE that leaves exactly the noise of the schedule (arXiv 2605.23522), with
the noise level that Tencent-Hunyuan/Precise has for it, 1.5, and as there GRPO-Guard's ratio, no KL
and no guidance. Where `algorithms/guard` has Flow-SDE's noise in three of 20 steps, here it is in
the first 8 of 10; upstream has 20 steps for FLUX.2 Klein, and trains all but the last. The last but
one is left out here: its noise is so small that its gradient is 28 times as long as any other's.

Upstream's clip range, 4e-6, is of a mean over 131,072 dimensions; here there are 1,024, so that it
is 128 times as large. A step is weighted by the inverse of its length, where upstream has that of
the change in its mean with the velocity, which is 1 to 2 times as long. The learning rate and the
one update an epoch are those of `configs/shapes.py`.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-precise"
    c.sample.kernel, c.sample.noise_level = "precise", 1.5
    c.sample.steps, c.sample.window, c.sample.window_range = 10, 8, (0, 0)
    c.algorithm.options.trust_region = "guard"
    c.algorithm.options.step_weight = "guard"
    c.algorithm.options.clip_range = 5e-4
    return c
