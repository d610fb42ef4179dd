"""Online Diffusion-DPO on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/dpo

The best and the worst of each group of 12, each pair with 6 draws of noise, and flow_grpo's beta.
The images are drawn by the ODE in 20 steps, whose noise levels are trained.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-dpo"
    c.algorithm.name = "dpo"
    c.algorithm.options = ConfigDict(
        {
            "beta": 100.0,
            "levels": 1,
            "reset_every": 0,
        }
    )
    c.sample.steps = 20
    return c
