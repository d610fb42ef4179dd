"""DDPO's advantage (arXiv 2305.13301): the statistics of each prompt over several epochs."""

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


def per_prompt(
    group_size: int, clip: float, buffer_size: int = 32, min_count: int = 16
) -> Advantage:
    """The deviation from what the prompt's last images scored, over several epochs (DDPO).

    The last `buffer_size` valid rewards of each prompt are remembered. They take the new ones in
    first; then a prompt with at least `min_count` of them uses their mean and population standard
    deviation, and any other prompt those of the whole batch.
    """
    if not 1 <= min_count <= buffer_size:
        raise ValueError(
            f"advantage.options: min_count={min_count} must be between 1 and"
            f" buffer_size={buffer_size}"
        )

    def initial(prompts: int) -> Memory:
        return {"rewards": jnp.full((prompts, buffer_size), jnp.nan)}  # oldest first, NaN: none

    def remember(rewards: jax.Array, new: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        place, values = new
        row = jnp.concatenate([rewards[place], values])
        row = row[jnp.argsort(jnp.isfinite(row), stable=True)]  # those without a value go first
        return rewards.at[place].set(row[-buffer_size:]), None

    def compute(
        memory: Memory, scores: jax.Array, weights: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, Memory]:
        total, valid = weighted(scores, weights)
        new = jnp.where(valid, total, jnp.nan).reshape(-1, group_size)
        rewards, _ = jax.lax.scan(remember, memory["rewards"], (ids, new))
        known = rewards[ids]
        enough = jnp.isfinite(known).sum(1, keepdims=True) >= min_count
        own, batch = (_statistics(known, axis=1), _statistics(new, axis=None))
        mean, std = (jnp.where(enough, o, b) for o, b in zip(own, batch))
        advantage = jnp.where(jnp.isfinite(new), (new - mean) / (std + 1e-6), 0.0)
        return jnp.clip(advantage, -clip, clip).reshape(-1), {"rewards": rewards}

    return Advantage(compute, initial)


def _statistics(values: jax.Array, axis: int | None) -> tuple[jax.Array, jax.Array]:
    """Return mean and population standard deviation of the values that are not NaN."""
    mask = jnp.isfinite(values).astype(jnp.float32)
    values = jnp.nan_to_num(values)
    return masked_mean(values, mask, axis), masked_deviation(values, mask, axis)
