"""DDPO on the bundled model: `configs/shapes.py` with statistics of each prompt.

    python -m flowgrpo_jax.train --config algorithms/ddpo

DDPO's importance sampling (arXiv 2305.13301) is the clipped ratio of `grpo`; it differs in what an
image is compared with, its prompt's last 32 rewards over several epochs, or all of the epoch's
where a prompt has had fewer than 16. These numbers are those of jannerm/ddpo, as are the clip of
advantages, and the training of all steps. An epoch has 4 updates, as in kvablack/ddpo-pytorch.

The paper has no flow models. Its sampler is DDIM with eta = 1, and at the same signal-to-noise
ratios that is the kernel `precise` with a noise level of sqrt(2) (`tests/test_marginals.py`).
Here it takes 10 steps, for the paper's 50, and the last two are without noise and not trained: the
noise of the last but one is so small that its gradient is 30 times as long as any other.

A prompt has 12 images in an epoch, where the paper draws a prompt for each image; the epoch has 16
prompts, so that the images of an update can be shared by 16 devices. The paper's clip range, 1e-4,
is of a mean over 16,384 dimensions; here there are 1,024, so that it is 16 times as large. The
learning rate is a third of `configs/shapes.py`'s for the four updates, and falls after as many
images as there, in 60 epochs; it was not tuned. There is no guidance, for the paper's 5.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-ddpo"
    c.sample.kernel, c.sample.noise_level = "precise", 2**0.5
    c.sample.steps, c.sample.window, c.sample.window_range = 10, 8, (0, 0)
    c.sample.groups, c.sample.micro_batch = 16, 48
    c.advantage.name, c.advantage.clip = "per_prompt", 10.0
    c.advantage.options = ConfigDict({"buffer_size": 32, "min_count": 16})
    c.algorithm.options.clip_range = 1.6e-3
    c.train.updates_per_epoch = 4
    c.train.learning_rate, c.train.decay_steps = 5e-4, 240
    return c
