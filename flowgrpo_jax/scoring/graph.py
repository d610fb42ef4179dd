"""Rewards in the graph: jitted on the devices, from the images where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowgrpo_jax.types import GraphReward, Metadata, Scores

# score(images uint8 [M, H, W, 3], prepared, rows i32 [M]) -> Scores of jax arrays
Score = Callable[[jax.Array, Any, jax.Array], Scores]


def prepare(
    rewards: Mapping[str, GraphReward], prompts: Sequence[str], metadata: Sequence[Metadata]
) -> dict[str, Any]:
    """What each reward wants to know of P prompts (token ids, mostly): {name: arrays [P, ...]}."""
    return {name: reward.prepare(prompts, metadata) for name, reward in rewards.items()}


def once(place: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`place` for trees of arrays, which puts each array once, whoever brings it again.

    Rewards on one tower hold the very same arrays (towers.py), and so do composites of the same
    reward. Arrays are told apart by identity; all that were brought are kept alive for that.
    """
    placed: dict[int, tuple[Any, Any]] = {}

    def leaf(x: Any) -> Any:
        if id(x) not in placed:
            placed[id(x)] = x, place(x)
        return placed[id(x)][1]

    return lambda weights: jax.tree.map(leaf, weights)


def composite(
    rewards: Mapping[str, GraphReward], place: Callable[[Any], Any] = lambda weights: weights
) -> Score:
    """All rewards in the graph as one jitted function; its `rows` point into what was prepared.

    Args:
      place: puts a reward's weights onto the devices; `once` for weights that are shared.
    """
    if not rewards:
        return lambda images, prepared, rows: {}
    weights = {name: place(reward.weights) for name, reward in rewards.items()}
    score = program({name: reward.score for name, reward in rewards.items()})
    return lambda images, prepared, rows: score(weights, images, prepared, rows)


def program(scores: Mapping[str, Callable[[Any, jax.Array, Any], jax.Array]]) -> Callable[..., Any]:
    """Jitted f({name: weights}, images, prepared, rows) -> Scores."""

    @jax.jit
    def score(weights: Any, images: jax.Array, prepared: Any, rows: jax.Array) -> Scores:
        out = {}
        for name, own in scores.items():
            mine = jax.tree.map(lambda x: x[rows], prepared[name])
            values = own(weights[name], images, mine).astype(jnp.float32)
            out[name] = jnp.where(jnp.isfinite(values), values, jnp.nan)
        return out

    return score
