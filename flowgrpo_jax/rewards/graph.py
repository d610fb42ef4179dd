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


def composite(
    rewards: Mapping[str, GraphReward], place: Callable[[Any], Any] = lambda weights: weights
) -> Score:
    """All rewards in the graph as one jitted function; its `rows` point into what was prepared.

    Args:
      place: puts a reward's weights onto the devices, once.
    """
    if not rewards:
        return lambda images, prepared, rows: {}
    weights = {name: place(reward.weights) for name, reward in rewards.items()}

    @jax.jit
    def score(weights: Any, images: jax.Array, prepared: Any, rows: jax.Array) -> Scores:
        out = {}
        for name, reward in rewards.items():
            mine = jax.tree.map(lambda x: x[rows], prepared[name])
            scores = reward.score(weights[name], images, mine).astype(jnp.float32)
            out[name] = jnp.where(jnp.isfinite(scores), scores, jnp.nan)
        return out

    return lambda images, prepared, rows: score(weights, images, prepared, rows)
