"""G2RPO on the bundled model: `configs/shapes.py` with pictures at three strides.

    python -m flowgrpo_jax.train --config algorithms/g2rpo

The images of a prompt follow one path of the ODE up to a step of the first half, which is computed
once, take a stochastic step there, each with its own noise, and go on by the ODE three times, with
every step, every second and every third one. A transition is trained with the sum of its advantages
in the three groups (arXiv 2510.01982; the paper was not at hand, the form is that of two notes on
it). Here the three are parts of an epoch with the same noise, and the mean of the three gradients
is a third of the gradient for the sum, as long as no ratio is clipped: a clip acts on each of the
three advantages by itself.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-g2rpo"
    c.sample.kernel, c.sample.noise_level = "flow_sde", 0.7
    c.sample.window, c.sample.window_range = 1, (0, 10)
    c.sample.branches = 0  # all of a group
    c.sample.strides = (1, 2, 3)
    c.sample.micro_batch = 96
    return c
