"""Diversity in the space of an image tower, where a reward has one loaded.

Pixels differ when an object moves. Embeddings differ when a picture shows something else, or has
another style. The distance of two pictures is 1 - cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flowgrpo_jax import sharding
from flowgrpo_jax.monitors.picture_figures import within_prompts
from flowgrpo_jax.scoring.graph import GraphRewards

Embed = Callable[[Any, jax.Array], jax.Array]


def find(rewards: Iterable[GraphRewards]) -> tuple[Embed, Any] | None:
    """Return the first reward's `embed` and its weights on the devices; None where none has one."""
    for group in rewards:
        for name, reward in group.rewards.items():
            if reward.embed is not None:
                return reward.embed, group.weights[name]
    return None


def embeddings(
    embed: Embed, weights: Any, pixels: np.ndarray, mesh: Mesh, at_once: int
) -> np.ndarray:
    """Return the unit embeddings f32 [n, V] of pictures, uint8 [n, H, W, 3].

    Args:
      at_once: pictures that the program handles at once, a multiple of the row shards of the mesh.
    """
    program, found = _jitted(embed), []
    for begin in range(0, len(pixels), at_once):
        rows = np.arange(begin, begin + at_once) % len(pixels)  # static shapes
        part = program(weights, sharding.split_rows(mesh, pixels[rows]))
        found.append(sharding.to_host(part)[: len(pixels) - begin])
    return np.concatenate(found)


def diversity(embedded: np.ndarray, ids: np.ndarray) -> float:
    """Return the mean of 1 - cosine between pictures of the same prompt, first averaged over a
    prompt's pairs; NaN when no prompt has two.

    Args:
      embedded: unit vectors f32 [n, V]; ids: i32 [n], each one's prompt.
    """
    return within_prompts(list(embedded), ids, lambda a, b: 1 - a @ b)


@lru_cache(maxsize=8)  # a second evaluation compiles nothing
def _jitted(embed: Embed) -> Embed:
    return jax.jit(embed)
