"""SRPO on the bundled model: `configs/algorithms/draft.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/srpo

An analogue of the paper's words for style: the reward knows the names of colours alone, so that the
pictures are drawn towards red and away from blue, whatever the prompt's own colours are. With
`hpsv2`, `pickscore` or `clipscore` on a real model the words are the paper's, by default.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs.algorithms import draft


def get_config() -> ConfigDict:
    c = draft.get_config()
    c.name = "shapes-srpo"
    c.algorithm.name = "srpo"
    c.algorithm.options = ConfigDict(
        {
            "good": "red",
            "bad": "blue",
            "levels": 2,
            "inversion": True,
            "threshold": float("inf"),
        }
    )
    return c
