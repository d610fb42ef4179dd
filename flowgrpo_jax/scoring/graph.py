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
    """Prepare each reward's inputs for P prompts (mostly token ids): {name: arrays [P, ...]}."""
    return {name: reward.prepare(prompts, metadata) for name, reward in rewards.items()}


def place_once(place: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a version of `place` for trees of arrays that places each array only once.

    Rewards on one tower share the same arrays (towers.py), and so do composites of the same
    reward. Arrays are compared by identity; for that, every array that was placed is kept alive.
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
    """Combine the rewards in the graph into one jitted function of images, inputs and rows.

    The inputs are those that `prepare` returned; `rows` holds the row of each image in them.

    Args:
      place: puts a reward's weights onto the devices; `place_once` for weights that are shared.
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
