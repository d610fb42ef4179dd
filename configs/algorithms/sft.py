"""Fine-tuning of the bundled model on its best images: `configs/shapes.py` with another
algorithm.

    python -m flowgrpo_jax.train --config algorithms/sft

The best of each group of 12, with 12 draws of noise. The images are drawn by the ODE in 20 steps,
whose noise levels are trained.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-sft"
    c.algorithm.name = "sft"
    c.algorithm.options = ConfigDict(
        {
            "levels": 1,
            "kl_beta": 0.0,
        }
    )
    c.sample.steps = 20
    return c
