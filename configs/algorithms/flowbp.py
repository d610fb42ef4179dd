"""FlowBP-Sparse on the bundled model: `configs/algorithms/draft.py` with another algorithm.

    python -m flowgrpo_jax.train --config algorithms/flowbp

Four of 10 steps are trained an epoch, in place of four of 25.
"""

from ml_collections import ConfigDict

from flowgrpo_jax.configs.algorithms import draft


def get_config() -> ConfigDict:
    c = draft.get_config()
    c.name = "shapes-flowbp"
    c.algorithm.name = "flowbp"
    c.algorithm.options = ConfigDict(
        {"active": 4, "late_bias": 1.0, "rescale": 0.5, "threshold": float("inf")}
    )
    return c
