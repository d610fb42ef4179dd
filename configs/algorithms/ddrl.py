"""DDRL on the bundled model: `configs/shapes.py` with a loss on data in place of a KL.

    python -m flowgrpo_jax.train --config algorithms/ddrl

The data are the base model's own samples, which the paper finds to suffice; `data.source="shapes"`
has the pictures that it was pretrained on, and a folder's name has your own. As in the released
recipe the weight is 0.01, and the transform -exp(-A) is off (`advantage.transform="exp"`).

The released recipe draws 8 images a prompt in 20 steps and trains every second one; here the window
is that of `configs/shapes.py`.
"""

from flowgrpo_jax.configs import shapes


def get_config():
    c = shapes.get_config()
    c.name = "shapes-ddrl"
    c.data.source = "base"
    c.data.weight = 0.01
    c.data.images = 96
    return c
