"""DiffusionNFT on the bundled model: `configs/shapes.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/nft

The images are drawn by the plain ODE, without noise. The policy that draws them keeps up to half of
itself at the end of an epoch, as in the paper's first schedule. Advantages are divided by the
standard deviation of all rewards of an epoch, as in the paper.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-nft"
    c.algorithm.name = "nft"
    c.algorithm.options = ConfigDict(
        {
            "beta": 1.0,
            "advantage_clip": 5.0,
            "anchor": 1e-4,
            "old_flat": 0,
            "old_rate": 1e-3,
            "old_most": 0.5,
        }
    )
    c.advantage.name = "global"
    c.sample.steps = 10  # nine noise levels are trained
    return c
