"""Flow-DPPO on the bundled model: `configs/shapes.py` with other options.

    python -m flowgrpo_jax.train --config algorithms/flow_dppo

No clip: transitions are dropped by their KL. Of the two updates of an epoch the second has images
of an older policy. The published threshold, 1e-5, is of a mean over some 65,536 dimensions; here
there are 1,024, so that it is 64 times as large.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-flow-dppo"
    c.sample.kernel, c.sample.noise_level = "flow_sde", 0.7
    c.algorithm.options.trust_region = "dppo"
    c.algorithm.options.kl_threshold = 6.4e-4
    c.train.updates_per_epoch = 2
    return c
