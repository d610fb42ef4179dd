"""GRPO-Guard on the bundled model: `configs/shapes.py` with other options.

    python -m flowgrpo_jax.train --config algorithms/guard

The ratio of the noise's direction, weighted by the inverse of a step's length, with Flow-SDE's
noise. The paper's clip range, 2e-6 for rendered text, is of a mean over 65,536 dimensions; here
there are 1,024, so that it is 64 times as large.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-guard"
    c.sample.kernel, c.sample.noise_level = "flow_sde", 0.7
    c.algorithm.options.trust_region = "guard"
    c.algorithm.options.step_weight = "guard"
    c.algorithm.options.clip_range = 1.3e-4
    return c
