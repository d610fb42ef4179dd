"""Selection: the best image of a group, or the best and the worst, in the places of all its images.

A selected image takes several places, each with noise of its own, so that the forward pass of a
whole group is spent on what is selected: G draws of noise for the best image, or G / 2 for a pair.

An advantage of exactly 0 belongs to an image without a valid score, or to a group without spread:
such images are never selected. A group in which nothing can be selected has the weight 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowgrpo_jax.types import Rollout


class Selected(NamedTuple):
    """A rollout with selected images in the places of all, and which places count."""

    rollout: Rollout
    weight: jax.Array  # f32 [M], 1, or 0 in groups in which nothing was selected


def best(rollout: Rollout, advantage: jax.Array, group_size: int) -> Selected:
    """Put a group's best image into all of its places; images that share the best advantage take
    turns.

    Args:
      rollout: whole groups; advantage: f32 [M].
    """
    a = advantage.reshape(-1, group_size)
    a = jnp.where(a == 0, -jnp.inf, a)
    top = a.max(1, keepdims=True)
    first = jnp.argsort(a < top, axis=1, stable=True)  # the best ones come first
    turns = jnp.arange(group_size) % (a == top).sum(1, keepdims=True)
    picked = jnp.take_along_axis(first, turns, axis=1)
    return _place(rollout, picked, jnp.isfinite(top[:, 0]))


def best_and_worst(rollout: Rollout, advantage: jax.Array, group_size: int) -> Selected:
    """Put a group's best and worst images into its places by turns: best, worst, best, worst.

    Args:
      rollout: whole groups of even size; advantage: f32 [M].
    """
    a = advantage.reshape(-1, group_size)
    high, low = (jnp.where(a == 0, never, a) for never in (-jnp.inf, jnp.inf))
    pair = jnp.stack([high.argmax(1), low.argmin(1)], axis=1)
    return _place(rollout, jnp.tile(pair, (1, group_size // 2)), high.max(1) > low.min(1))


def _place(rollout: Rollout, picked: jax.Array, found: jax.Array) -> Selected:
    """Place the images picked [P, G], counted within each group, found [P]."""
    groups, size = picked.shape
    rows = (picked + size * jnp.arange(groups)[:, None]).reshape(-1)
    weight = jnp.repeat(found.astype(jnp.float32), size)
    return Selected(replace(rollout, latents=rollout.latents[rows]), weight)
