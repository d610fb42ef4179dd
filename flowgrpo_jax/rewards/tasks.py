"""A reward for some of the tasks of a mixture: other tasks' images neither gain nor lose by it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.types import GraphReward, Metadata, Reward


def restrict(reward: Reward | GraphReward, tasks: Collection[str]) -> Reward | GraphReward:
    """The reward for records whose "task" is one of `tasks`; all others score 0 and are valid.

    A group is of one prompt and so of one task: its advantages do not feel the zeros. Means over
    all images do.
    """

    def asked(metadata: Sequence[Metadata]) -> np.ndarray:
        return np.array([m.get("task") in tasks for m in metadata], bool)

    if isinstance(reward, GraphReward):
        inner = reward

        def prepare(prompts: Sequence[str], metadata: Sequence[Metadata]) -> Any:
            return asked(metadata), inner.prepare(prompts, metadata)

        def in_graph(weights: Any, images: jax.Array, prepared: Any) -> jax.Array:
            mask, rows = prepared
            return jnp.where(mask, inner.score(weights, images, rows), 0.0)

        return GraphReward(inner.weights, prepare, in_graph)

    def on_host(
        images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        scores, valid = np.zeros(len(images), np.float32), np.ones(len(images), bool)
        rows = np.flatnonzero(asked(metadata))
        if rows.size:
            chosen = [prompts[i] for i in rows], [metadata[i] for i in rows]
            scores[rows], valid[rows] = reward(images[rows], *chosen)
        return scores, valid

    return on_host
