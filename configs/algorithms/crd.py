"""Centred reward distillation on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/crd

Flow-Factory's recipe for rendered text: the ODE in 10 steps, 20 draws of noise an image, advantages
over the standard deviation of all images. There are 24 groups of 12 images in place of 48 of 24,
and one update an epoch in place of two. All images of an update are one micro-batch, because the
loss is centred over them.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-crd"
    c.algorithm.name = "crd"
    c.algorithm.options = ConfigDict(
        {
            "levels": 20,
            "beta": 1.0,
            "advantage_clip": 5.0,
            "center": "update",
            "center_weights": "uniform",
            "temperature": 1.0,
            "kl_beta": 0.1,
            "old_first": 0.25,
            "old_rate": 0.005,
            "old_most": 0.999,
            "drawer_flat": 75,
            "drawer_rate": 0.0075,
            "drawer_most": 0.999,
        }
    )
    c.advantage.name = "global"
    c.sample.steps = 10
    c.sample.micro_batch = c.sample.groups * c.sample.group_size
    return c
