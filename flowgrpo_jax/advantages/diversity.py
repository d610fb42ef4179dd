"""Diversity of a group: good images that are unlike the others of their prompt count more.

Source: GARDO (arXiv 2512.24138): a positive advantage is multiplied by the distance to the nearest
other image of the group, over the mean of these distances in the group. The distance is one minus
the cosine of two images' features, DINOv3's in the paper.

Deviation: the features are those at hand, the latents or the pixels in [-1, 1], or a function of
the user's own from pixels to features, such as a DINO tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax import sharding, tables
from flowgrpo_jax.types import Rollout

Features = Callable[[Sequence[Rollout], np.ndarray], np.ndarray]  # -> f32 [B, ...]
FEATURES = ("latents", "pixels")


def load(name: str) -> Features:
    """Return the features of the images of an epoch, by their rollouts and pixels.

    Args:
      name: "latents", "pixels" or "package.module:function", a function from uint8 [B, H, W, 3] to
        f32 [B, D].

    Raises ValueError for another name.
    """
    if name == "latents":
        return lambda rollouts, pixels: np.concatenate(
            [sharding.to_host(rollout.latents) for rollout in rollouts]
        )
    if name == "pixels":
        return lambda rollouts, pixels: pixels.astype(np.float32) / 127.5 - 1
    if ":" not in name:
        raise ValueError(
            f"advantage.diversity={name!r}: choose from {', '.join(map(repr, FEATURES))}, or give a"
            " function of your own as 'package.module:function'; '' means none"
        )
    function = tables.find({}, name, "advantage.diversity")
    return lambda rollouts, pixels: np.asarray(function(pixels), np.float32)


def needs_pixels(name: str) -> bool:
    """Whether the features of this name are read from pixels."""
    return name not in ("", "latents")


def nearest(features: np.ndarray, group_size: int) -> np.ndarray:
    """Return the distance of each image to the nearest other one of its group, f32 [B], in [0, 2].

    Args:
      features: f32 [B, ...], group-contiguous. An image whose features are not finite is no other
        image's neighbour; its own distance is NaN, as that of the only sound image of a group.
    """
    groups = features.reshape(-1, group_size, np.prod(features.shape[1:]))
    broken = ~np.isfinite(groups).all(-1)
    groups = np.where(broken[..., None], 0, groups)
    size = np.linalg.norm(groups, axis=-1, keepdims=True)
    unit = groups / np.maximum(size, np.finfo(np.float32).tiny)
    distance = 1 - np.clip(np.einsum("pid,pjd->pij", unit, unit), -1, 1)
    distance[:, np.arange(group_size), np.arange(group_size)] = np.inf
    distance = np.where(broken[:, None], np.inf, distance).min(-1)
    return np.where(broken | np.isinf(distance), np.nan, distance).reshape(-1).astype(np.float32)


def favour(
    advantage: jax.Array, features: np.ndarray, *, group_size: int, clip: float
) -> jax.Array:
    """Return the advantages f32 [B] or [W, B], the positive ones times an image's distance over its
    group's mean, cut to [-clip, clip]. A group of equal images, and an image whose features are not
    finite, keep their advantages.
    """
    distance = nearest(features, group_size).reshape(-1, group_size)
    known = np.isfinite(distance)
    total = np.where(known, distance, 0).sum(1, keepdims=True)
    mean = total / np.maximum(known.sum(1, keepdims=True), 1)
    factor = np.where(known & (mean > 0), distance / np.where(mean > 0, mean, 1), 1).reshape(-1)
    return jnp.clip(jnp.where(advantage > 0, advantage * factor, advantage), -clip, clip)
