"""Advantages: how much better an image is than it could be expected to be. One row each in `TABLE`.

An advantage takes the scores of an epoch and what it remembers of earlier epochs, and returns one
number an image and what it remembers now. Rows without memory return it as it came. A row of the
user's own is named in the recipe as "package.module:make".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
      reads_log_prob: whether `compute` takes the transitions' log-probs f32 [W, B] as well.
    """

    compute: Callable[..., tuple[jax.Array, Memory]]
    initial: Callable[[int], Memory] = lambda prompts: {}
    reads_log_prob: bool = False


TABLE = {
    "group": "flowgrpo_jax.advantages.group:group",
    "global": "flowgrpo_jax.advantages.group:over_all",
    "none": "flowgrpo_jax.advantages.group:undivided",
    "batch": "flowgrpo_jax.advantages.batch:batch",
    "quasi_norm": "flowgrpo_jax.advantages.quasi_norm:quasi_norm",
    "best_of_n": "flowgrpo_jax.advantages.best_of_n:best_of_n",
    "gdpo": "flowgrpo_jax.advantages.gdpo:gdpo",
    "per_prompt": "flowgrpo_jax.advantages.per_prompt:per_prompt",
    "tree": "flowgrpo_jax.advantages.tree:tree",
}


def load(
    name: str,
    options: Mapping[str, Any],
    *,
    group_size: int,
    clip: float,
    transform: str = "none",
    **paths: Any,
) -> Advantage:
    """Return the advantage of a row.

    Args:
      clip: advantages are cut to [-clip, clip].
      transform: what becomes of them, a key of `TRANSFORMS`.
      paths: how the images were drawn, for the rows that take it: `branches` (a
        branching.Branches) and `steps`, W.

    Raises ValueError that names the rows, or the row's options, where one is unknown.
    """
    if transform not in TRANSFORMS:
        choices = ", ".join(map(repr, TRANSFORMS))
        raise ValueError(f"advantage.transform={transform!r}: choose from {choices}")
    factory = tables.find(TABLE, name, "advantage")
    what = f"advantage.options of {name}"
    takes = inspect.signature(factory).parameters if callable(factory) else {}
    given = {"group_size": group_size, "clip": clip}
    given |= {key: value for key, value in paths.items() if key in takes}
    made = tables.make(factory, options, what, **given)
    return TRANSFORMS[transform](tables.check(made, Advantage, name), clip)


def exponential(row: Advantage, clip: float) -> Advantage:
    """Return a row with -exp(-A) in place of A: DDRL's transform (arXiv 2512.04332), by cosmos-rl.

    It keeps the order of the images and pushes all away, the worst most, so that a loss on data has
    to hold the policy. The result is cut to the clip as well: images with A below -log(clip), which
    is -1.6 for a clip of 5, count alike. Equal rewards push too. Images without a valid score keep
    advantage 0.
    """

    def compute(
        memory: Memory, scores: jax.Array, weights: jax.Array, ids: jax.Array, *paths: jax.Array
    ) -> tuple[jax.Array, Memory]:
        advantage, memory = row.compute(memory, scores, weights, ids, *paths)
        pushed = jnp.clip(-jnp.exp(-advantage), -clip, clip)
        return jnp.where(weighted(scores, weights)[1], pushed, 0.0), memory

    return replace(row, compute=compute)


TRANSFORMS: dict[str, Callable[[Advantage, float], Advantage]] = {
    "none": lambda row, clip: row,
    "exp": exponential,
}


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
    centred = (r - masked_mean(r, w, axis=1)) * w
    return jnp.clip(centred / DIVISORS[std](r, w, epsilon), -clip, clip).reshape(-1)


# What centred rewards are divided by: f(rewards [P, G], mask [P, G], epsilon) -> [P or 1, 1].
DIVISORS: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "group": lambda r, mask, epsilon: masked_deviation(r, mask, 1) + epsilon,
    "global": lambda r, mask, epsilon: masked_deviation(r, mask, None) + epsilon,
    "none": lambda r, mask, epsilon: jnp.ones((1, 1)),
}


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | None) -> jax.Array:
    """Return the mean where the mask, f32, is 1; the axis stays with length 1.

    The second pass removes the rounding of the first: equal rewards have exactly their own value as
    mean, and so exactly no advantage.
    """
    total = jnp.maximum(mask.sum(axis, keepdims=True), 1.0)
    mean = (x * mask).sum(axis, keepdims=True) / total
    return mean + ((x - mean) * mask).sum(axis, keepdims=True) / total


def masked_deviation(
    x: jax.Array, mask: jax.Array, axis: int | None, *, sample: bool = False
) -> jax.Array:
    """Return the standard deviation where the mask, f32, is 1; the axis stays with length 1.

    Args:
      sample: divide by one less than the number of values, as torch does; of the population if not.
    """
    squares = jnp.square((x - masked_mean(x, mask, axis)) * mask)
    variance = masked_mean(squares, mask, axis)
    if sample:
        count = mask.sum(axis, keepdims=True)
        variance *= count / jnp.maximum(count - 1, 1.0)
    return jnp.sqrt(variance)
