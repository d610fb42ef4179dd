"""Best of N: DanceGRPO's selection (arXiv 2505.07818), `--bestofn` in its trainer of videos."""

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


def best_of_n(group_size: int, clip: float, keep: int = 8) -> Advantage:
    """The deviation from the group's mean over its sample standard deviation plus 1e-8, for the
    keep / 2 best and the keep / 2 worst images of a group; the others have advantage 0.

    Of equal images those that come first in the group count as worse.

    Deviation from upstream, which trains on the kept images alone: the others still take their part
    in the update, so that it is no cheaper, and the loss, a mean over all images, is keep / G times
    as large. Adam takes that factor out.

    Args:
      keep: how many images of a group are learned from.
    """
    if keep % 2 or not 2 <= keep <= group_size:
        raise ValueError(
            f"advantage.options.keep={keep}: half of them are the best and half the worst, so it"
            f" must be even, from 2 to sample.group_size={group_size}"
        )

    def compute(
        memory: Memory, scores: jax.Array, weights: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, Memory]:
        total, valid = (part.reshape(-1, group_size) for part in weighted(scores, weights))
        mask = valid.astype(jnp.float32)
        centred = (total - masked_mean(total, mask, 1)) * mask
        advantage = centred / (masked_deviation(total, mask, 1, sample=True) + 1e-8)
        order = jnp.argsort(jnp.where(valid, total, jnp.inf), axis=1, stable=True)
        rank = jnp.argsort(order, axis=1)  # from the worst; those without a score come last
        last = valid.sum(1, keepdims=True) - keep // 2
        kept = (rank < keep // 2) | (rank >= last)
        return jnp.clip(jnp.where(kept, advantage, 0.0), -clip, clip).reshape(-1), memory

    return Advantage(compute)
