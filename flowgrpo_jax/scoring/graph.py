"""Rewards in the graph: jitted on the devices, from the images where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowgrpo_jax.types import GraphReward, Metadata, NamedScores


class GraphRewards:
    """The rewards in the graph as one jitted program, with their weights on the devices.

    Attributes:
      weights: {name: the reward's weights, placed}.
      program: (weights, images uint8 [M, H, W, 3], prepared, rows i32 [M]) -> NamedScores.
        `rows` holds the row of each image in the arrays of `prepared`.
    """

    def __init__(
        self,
        rewards: Mapping[str, GraphReward],
        place: Callable[[Any], Any] = lambda weights: weights,
    ):
        """
        Args:
          place: puts a reward's weights onto the devices; `place_once` for weights that are shared.
        """
        self.rewards = dict(rewards)
        self.weights = {name: place(reward.weights) for name, reward in rewards.items()}
        self.program = _program({name: reward.score for name, reward in rewards.items()})

    def prepare(self, records: Sequence[Metadata]) -> dict[str, Any]:
        """Prepare each reward's inputs for P prompts, mostly token ids: {name: [P, ...]}."""
        prompts = [record["prompt"] for record in records]
        return {name: reward.prepare(prompts, records) for name, reward in self.rewards.items()}

    def __call__(self, images: jax.Array, prepared: Any, rows: Any) -> NamedScores:
        """Return the scores of a micro-batch, f32 [M] on the devices; none without rewards."""
        return self.program(self.weights, images, prepared, rows) if self.rewards else {}


def place_once(place: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a version of `place` for trees of arrays that places each array only once.

    Rewards on one tower share the same arrays (towers.py), and so do the scorers of training and
    of evaluation. Arrays are compared by identity; for that, every array that was placed is kept
    alive.
    """
    placed: dict[int, tuple[Any, Any]] = {}

    def leaf(x: Any) -> Any:
        if id(x) not in placed:
            placed[id(x)] = x, place(x)
        return placed[id(x)][1]

    return lambda weights: jax.tree.map(leaf, weights)


def _program(
    scores: Mapping[str, Callable[[Any, jax.Array, Any], jax.Array]],
) -> Callable[..., NamedScores]:
    @jax.jit
    def score(weights: Any, images: jax.Array, prepared: Any, rows: jax.Array) -> NamedScores:
        out = {}
        for name, own in scores.items():
            mine = jax.tree.map(lambda x: x[rows], prepared[name])
            values = own(weights[name], images, mine).astype(jnp.float32)
            out[name] = jnp.where(jnp.isfinite(values), values, jnp.nan)
        return out

    return score
