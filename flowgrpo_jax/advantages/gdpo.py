"""GDPO (arXiv 2601.05242): several rewards, each normalised by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.advantages import DIVISORS, Advantage, Memory, masked_mean, normalised, weighted


def gdpo(group_size: int, clip: float, std: str = "group") -> Advantage:
    """Every reward is normalised by itself; the weighted sum is brought back to a standard
    deviation of one over the batch. A reward with a large range does not drown a small one.

    Args:
      std: what each reward is divided by, a key of `DIVISORS`.
    """
    if std not in DIVISORS:
        raise ValueError(f"advantage.options.std={std!r}: choose from {', '.join(DIVISORS)}")

    def compute(
        memory: Memory, scores: jax.Array, weights: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, Memory]:
        _, valid = weighted(scores, weights)
        each = jax.vmap(
            lambda r, ok: normalised(r, ok, group_size=group_size, std=std, clip=jnp.inf)
        )(jnp.nan_to_num(scores), valid & jnp.isfinite(scores))
        mixed, _ = weighted(each, weights)
        spread = jnp.sqrt(masked_mean(jnp.square(mixed), valid.astype(jnp.float32), axis=None))
        return jnp.clip(jnp.where(valid, mixed / (spread + 1e-4), 0.0), -clip, clip), memory

    return Advantage(compute)
