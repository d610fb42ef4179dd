"""Advantages: how much better an image is than it could be expected to be. One row each in `TABLE`.

An advantage takes the scores of an epoch and what it remembers of earlier epochs, and returns one
number an image and what it remembers now. Rows without memory return it as it came. A row of the
user's own is named in the recipe as "package.module:make".

Sources: Flow-GRPO (arXiv 2505.05470) and DeepSeekMath (arXiv 2402.03300) for the group; GDPO (arXiv
2601.05242) for several rewards; DDPO (arXiv 2305.13301) for statistics of each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flowgrpo_jax import tables

Memory = dict[str, jax.Array]


@dataclass(frozen=True)
class Advantage:
    """A row of the table with its options.

    Attributes:
      compute: (memory, scores f32 [K, B], weights f32 [K, B], prompt ids i32 [P]) -> (advantage
        f32 [B], or [W, B] with one value for each transition of the window; memory). B = P x G
        images are group-contiguous; a score is NaN where its reward failed or does not apply; the
        weights are those of `weighted`. Images without a valid score get advantage 0.
      initial: (number of training prompts) -> the memory before the first epoch.
    """

    compute: Callable[[Memory, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Memory]]
    initial: Callable[[int], Memory] = lambda prompts: {}


TABLE = {
    "group": "flowgrpo_jax.advantages:group",
    "global": "flowgrpo_jax.advantages:over_all",
    "none": "flowgrpo_jax.advantages:undivided",
    "gdpo": "flowgrpo_jax.advantages:gdpo",
    "per_prompt": "flowgrpo_jax.advantages:per_prompt",
}


def load(name: str, options: Mapping[str, Any], *, group_size: int, clip: float) -> Advantage:
    """Return the advantage of a row.

    Args:
      clip: advantages are cut to [-clip, clip].

    Raises ValueError that names the rows, or the row's options, where one is unknown.
    """
    shared = {"group_size": group_size, "clip": clip}
    factory = tables.find(TABLE, name, "advantage")
    return tables.make(factory, shared | dict(options), f"advantage.options of {name}")


def group(group_size: int, clip: float) -> Advantage:
    """The deviation from the group's mean, divided by the group's standard deviation."""
    return _of_sum(group_size, clip, "group")


def over_all(group_size: int, clip: float) -> Advantage:
    """The deviation from the group's mean, divided by the standard deviation over all images."""
    return _of_sum(group_size, clip, "global")


def undivided(group_size: int, clip: float) -> Advantage:
    """The deviation from the group's mean (Dr. GRPO, arXiv 2503.20783)."""
    return _of_sum(group_size, clip, "none")


def _of_sum(group_size: int, clip: float, std: str) -> Advantage:
    def compute(
        memory: Memory, scores: jax.Array, weights: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, Memory]:
        total, valid = weighted(scores, weights)
        return normalised(total, valid, group_size=group_size, std=std, clip=clip), memory

    return Advantage(compute)


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
        spread = jnp.sqrt(_mean(jnp.square(mixed), valid.astype(jnp.float32), axis=None))
        return jnp.clip(jnp.where(valid, mixed / (spread + 1e-4), 0.0), -clip, clip), memory

    return Advantage(compute)


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
    weight = jnp.isfinite(values).astype(jnp.float32)
    values = jnp.nan_to_num(values)
    return _mean(values, weight, axis), _deviation(values, weight, axis)


# ------------------------------------------------------------------------------ arithmetic


def weighted(scores: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return several rewards as one: (sum of weight x score f32 [B], valid bool [B]).

    Args:
      scores: f32 [K, B]; NaN where a reward failed.
      weights: f32 [K, B]; a score of weight 0 or NaN (does not apply) cannot spoil an image.
    """
    trained = jnp.nan_to_num(weights) != 0
    finite = jnp.isfinite(scores)
    total = jnp.where(trained & finite, weights * scores, 0.0).sum(0)
    return total, (finite | ~trained).all(0)


def normalised(
    rewards: jax.Array,
    valid: jax.Array,
    *,
    group_size: int,
    std: str = "group",
    clip: float = 5.0,
    epsilon: float = 1e-4,
) -> jax.Array:
    """Return (reward - mean of its group) / (std + epsilon), cut to [-clip, clip], f32 [B].

    Args:
      rewards: f32 [B], B = P x G, group-contiguous.
      valid: bool [B]; invalid images count in no statistic and get advantage 0.
      std: a key of `DIVISORS`.
    """
    r = jnp.where(valid, rewards, 0.0).reshape(-1, group_size).astype(jnp.float32)
    w = valid.reshape(-1, group_size).astype(jnp.float32)
    centred = (r - _mean(r, w, axis=1)) * w
    return jnp.clip(centred / DIVISORS[std](r, w, epsilon), -clip, clip).reshape(-1)


def _deviation(r: jax.Array, w: jax.Array, axis: int | None) -> jax.Array:
    return jnp.sqrt(_mean(jnp.square((r - _mean(r, w, axis)) * w), w, axis))


# What centred rewards are divided by: f(rewards [P, G], weights [P, G], epsilon) -> [P or 1, 1].
DIVISORS: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "group": lambda r, w, epsilon: _deviation(r, w, 1) + epsilon,
    "global": lambda r, w, epsilon: _deviation(r, w, None) + epsilon,
    "none": lambda r, w, epsilon: jnp.ones((1, 1)),
}


def _mean(x: jax.Array, weight: jax.Array, axis: int | None) -> jax.Array:
    """Weighted mean. The second pass removes the rounding of the first: equal rewards have exactly
    their own value as mean, and so exactly no advantage."""
    total = jnp.maximum(weight.sum(axis, keepdims=True), 1.0)
    mean = (x * weight).sum(axis, keepdims=True) / total
    return mean + ((x - mean) * weight).sum(axis, keepdims=True) / total
