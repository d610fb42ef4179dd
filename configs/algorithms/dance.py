"""DanceGRPO on the bundled model: `configs/shapes.py` with other noise, and the best and the worst.

    python -m flowgrpo_jax.train --config algorithms/dance

The published scripts (arXiv 2505.07818) have 16 steps, all with noise of 0.3 in the paper's kernel,
from one first noise for all images of a prompt, and no KL. Of the 15 steps before the last they
train a share of 0.6, drawn at random. The script for videos draws 24 images of a prompt and learns
from the 4 best and the 4 worst; that for images draws 12 and learns from all.

Here 12 prompts have 24 images each. The last two steps are without noise, for the last but one
would leave 15 times the noise that it should on this schedule, which upstream's is not; 0.6 of the
other 14 are 8. All images of an epoch share their steps, where upstream draws them for each image.
There is one update an epoch, in place of upstream's 3 for images, so that the clip does not act:
the published range, 1e-4, is of a mean over 129,600 dimensions; here there are 1,024, so that it is
127 times as large. The learning rate is that of `configs/shapes.py`.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-dance"
    c.sample.groups, c.sample.group_size = 12, 24
    c.sample.kernel, c.sample.noise_level = "dance", 0.3
    c.sample.steps, c.sample.window, c.sample.window_range = 16, 14, (0, 0)
    c.sample.branches = 0  # all of a group
    c.algorithm.options.steps = 8
    c.algorithm.options.clip_range = 1.3e-2
    c.advantage.name = "best_of_n"
    c.advantage.options = ConfigDict({"keep": 8})
    return c
