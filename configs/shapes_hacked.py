"""A run that is hacked on purpose: the page and the monitors have to show it.

    python -m flowgrpo_jax.train --config shapes_hacked
    python -m flowgrpo_jax.train --config shapes_hacked:remedy

Hardware: 2 CPU cores, about 3 minutes. The reward is a small JPEG file. Without a KL the policy
finds the shortest way to it, an empty canvas. `remedy` trains on the same reward with a KL term to
the base model. docs/report.md shows both.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config(variant: str = "") -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes_hacked"
    c.epochs = 18
    c.cpu_devices = 1

    c.sample.groups, c.sample.group_size = 6, 8
    c.sample.micro_batch = 48
    c.sample.steps, c.sample.window, c.sample.window_range = 10, 3, (1, 6)

    c.reward.weights = ConfigDict({"jpeg_compressibility": 1.0, "shapes": 0.0})

    c.train.decay_steps = 0
    c.train.ema_decay = 0.8

    c.eval.rewards = ("jpeg_compressibility", "shapes", "shapes_strict")
    c.eval.images, c.eval.steps, c.eval.every, c.eval.grid = 96, 10, 6, 24
    c.checkpoint.best = ""
    if variant not in ("", "remedy"):
        raise ValueError(f"shapes_hacked:{variant}: choose shapes_hacked or shapes_hacked:remedy")
    if variant == "remedy":
        c.name = "shapes_hacked-remedy"
        c.algorithm.options.kl_beta = 1.0
    return c
