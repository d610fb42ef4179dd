"""DRaFT-LV on the bundled model: `configs/algorithms/draft.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/draft_lv

The step before the last one is trained, whose level of noise tells the noised copies apart.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs.algorithms import draft


def get_config() -> ConfigDict:
    c = draft.get_config()
    c.name = "shapes-draft-lv"
    c.algorithm.name = "draft_lv"
    c.algorithm.options = ConfigDict({"noised": 2, "last": 2, "threshold": float("inf")})
    return c
