"""Batch-wise normalisation: Pinterest's large-scale RL (arXiv 2401.12244), its `train.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.advantages import (
    Advantage,
    Memory,
    masked_deviation,
    masked_mean,
    weighted,
)


def batch(group_size: int, clip: float) -> Advantage:
    """The deviation from the mean over all images of the epoch, divided by their sample standard
    deviation plus 1e-7.

    An image of an easy prompt is then better than one of a hard prompt, whatever its group did.
    Images without a valid score count in no statistic. The paper cuts to `advantage.clip` 10.
    """
    del group_size

    def compute(
        memory: Memory, scores: jax.Array, weights: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, Memory]:
        total, valid = weighted(scores, weights)
        mask = valid.astype(jnp.float32)
        centred = (total - masked_mean(total, mask, None)) * mask
        spread = masked_deviation(total, mask, None, sample=True)
        return jnp.clip(centred / (spread + 1e-7), -clip, clip), memory

    return Advantage(compute)
