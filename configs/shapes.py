"""GenEval in miniature on the bundled model.

    python -m flowgrpo_jax.train --config shapes

Hardware: 2 CPU cores. docs/results.md has the curve, the time it took and what to expect.
CPS noise in three steps whose place is drawn anew each epoch among those where composition is
decided, the ODE before and after, no guidance: the policy is trained close to how it is evaluated.
With ten steps and noise in the first five, rollouts improved faster and the 40-step ODE did not: a
good part of what was learned made up for the coarse steps.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "shapes"
    c.epochs = 400

    c.model.path = "shapes"
    c.model.dtype = "float32"
    c.model.product_dtype = "auto"  # bfloat16 where the CPU is faster with it
    c.model.height, c.model.width = 64, 64
    c.model.decode_batch = 12  # 6 % faster than 72 at once: they fit into the caches
    c.model.remat = False  # 0.4 GB more, and a quarter less work in the update
    c.cpu_devices = 0  # small steps leave some of the cores idle when one device has them all

    c.lora.rank, c.lora.alpha = 16, 32.0

    c.prompts.train, c.prompts.test = "shapes:train", "shapes:test"
    with c.prompts.unlocked():
        c.prompts.tag_weights = ConfigDict(
            {  # all tags alike: a small model unlearns what it is not asked for
                "position": 1.0,
                "counting": 1.0,
                "color_attr": 1.0,
                "colors": 1.0,
                "two_object": 1.0,
                "single_object": 1.0,
            }
        )

    c.sample.groups, c.sample.group_size = 24, 12
    c.sample.micro_batch = 144
    c.sample.guidance_scale = 1.0
    c.sample.kernel, c.sample.noise_level = "cps", 0.6
    c.sample.steps, c.sample.window, c.sample.window_range = 20, 3, (3, 10)

    c.reward.weights = ConfigDict({"shapes": 1.0})

    c.train.updates_per_epoch = 1
    c.train.learning_rate, c.train.decay_steps = 1.5e-3, 40
    c.train.b2 = 0.95  # gradients grow as pictures get better: a longer memory makes steps too long
    c.algorithm.options.clip_range = 5e-3
    c.train.ema_decay = 0.97

    c.eval.every = 25
    c.eval.guidance_scale = 1.0
    c.eval.rewards = ("shapes", "shapes_strict", "shapes_unknown")
    c.checkpoint.best = "shapes_strict"
    c.checkpoint.every = 25
    return c
