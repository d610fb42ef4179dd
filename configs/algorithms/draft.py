"""DRaFT-K on the bundled model: the gradient of the reward through the rollout's last steps.

    python -m flowgrpo_jax.train --config algorithms/draft

The reward is `shapes_colors`, which is a smooth function of the pixels and knows colours alone;
`shapes`, which judges the whole prompt, is logged beside it and shows what that costs. The prompts
are those that name colours. The last step of the schedule begins at sigma = 0.009 and says next to
nothing, so that K = 4 means three steps.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-draft"
    c.epochs = 100
    c.algorithm.name = "draft"
    c.algorithm.options = ConfigDict({"last": 4, "threshold": float("inf")})
    c.prompts.tag_weights = ConfigDict({"colors": 1.0, "color_attr": 1.0})
    c.sample.steps = 10
    # No group is compared: few images of many prompts.
    c.sample.groups, c.sample.group_size, c.sample.micro_batch = 32, 2, 32
    c.reward.weights = ConfigDict({"shapes_colors": 1.0, "shapes": 0.0})
    c.train.learning_rate = 3e-4
    c.eval.rewards = ("shapes_colors", "shapes", "shapes_strict", "shapes_unknown")
    return c
