"""ReFL on the bundled model: `configs/algorithms/draft.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/refl

One of the last 5 of 10 steps is trained an epoch, about the share of the published recipes.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs.algorithms import draft


def get_config() -> ConfigDict:
    c = draft.get_config()
    c.name = "shapes-refl"
    c.algorithm.name = "refl"
    c.algorithm.options = ConfigDict({"last": 5, "threshold": float("inf")})
    return c
