"""GARDO on the bundled model: `configs/shapes.py` with a gated KL and credit for diversity.

    python -m flowgrpo_jax.train --config algorithms/gardo

The KL is that of the images alone that the trained reward likes suspiciously more than rewards that
are not trained on; the policy becomes its own reference when it has gone too far, and after 15
epochs. Good images count more the less they resemble the others of their prompt. Advantages are not
divided by a standard deviation, as in the published code.

The noise is that of `configs/shapes.py`, where the paper has Flow-SDE's. `kl_beta` and the KL that
is too far are the published ones, though here the KL is that of 1,024 dimensions: in 50 epochs it
stays below 3e-4, and the resets are those of age.

For the bundled model the watched rewards are the share of shapes that are none, and the size of the
picture as a JPEG; on SD3.5 take aesthetic and imagereward as in the paper, and kl_beta 0.04 to
0.07.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.name = "shapes-gardo"
    c.reward.weights = ConfigDict(
        {"shapes": 1.0, "shapes_unknown": 0.0, "jpeg_compressibility": 0.0}
    )
    c.algorithm.options.kl_beta = 0.04
    c.advantage.name = "none"
    c.advantage.diversity = "latents"
    c.kl.name = "uncertain"
    c.kl.options = ConfigDict(
        {
            "auxiliaries": {"shapes_unknown": -1.0, "jpeg_compressibility": 1.0},
            "share": 0.1,
            "least": 0.02,
            "most": 0.2,
            "rate": 0.1,
        }
    )
    c.kl.reset_above, c.kl.reset_every = 3e-4, 15
    return c
