"""Pinterest's large-scale RL on the bundled model: tasks in turn, and a pretraining step.

    python -m flowgrpo_jax.train --config algorithms/pinterest

Two tasks take turns, each with its prompts, its reward and its policy step: composition, and an
even use of the colours where the prompt leaves them open (the paper's distribution reward, with the
images of a prompt as its minibatch and colours in place of skin tones). After both there is one
optimiser step of the pretraining loss on the pictures that the model was pretrained on. Advantages
are normalised over all images of the epoch. Five steps of the rollout, drawn each epoch, are
trained, each by an optimiser step of its own.

The learning rate is a third of `configs/shapes.py`'s for the five steps; it was not tuned. It falls
after 200 optimiser steps, which are 40 epochs. The paper's clip range, 1e-4, is of a mean over
16,384 dimensions; here there are 1,024, so that it is 16 times as large. The last two of ten steps
are not drawn: the noise of the last but one is so small that its gradient is 30 times as long as
any other, and Adam would scale all others down by it. In the paper each image draws its own five
steps, of 50; here all images of an epoch share them.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-pinterest"
    c.prompts.train = c.prompts.test = ""
    with c.prompts.unlocked():
        c.prompts.tag_weights = ConfigDict()
        c.prompts.tasks = ConfigDict(
            {
                "colours": {"train": "shapes:train:position", "rewards": ("shapes_balance",)},
                "composition": {
                    "train": "shapes:train",
                    "test": "shapes:test",
                    "rewards": ("shapes", "shapes_strict", "shapes_unknown"),
                },
            }
        )
    c.prompts.alternate = True
    c.reward.weights = ConfigDict({"shapes": 1.0, "shapes_balance": 1.0})

    c.sample.steps, c.sample.window, c.sample.window_range = 10, 8, (0, 8)
    c.algorithm.options.steps = 5
    c.algorithm.options.clip_range = 1.6e-3
    c.train.step_each_term = True
    c.train.learning_rate, c.train.decay_steps = 5e-4, 200
    c.advantage.name, c.advantage.clip = "batch", 10.0

    c.data.source, c.data.weight, c.data.images = "shapes", 1.0, 96
    c.data.own_step, c.data.every = True, 2
    return c
