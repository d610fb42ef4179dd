"""The rewards in the graph with shapes in place of weights, for compilation without the weights.

Shapes are those of the published weights, wherever a recipe's options point. Nothing is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flowgrpo_jax.models.towers.aesthetic_head import Head
from flowgrpo_jax.models.towers.blip import BLIPConfig, ImageReward
from flowgrpo_jax.models.towers.clip import CLIP, VIT_H_14, VIT_L_14, DualConfig
from flowgrpo_jax.rewards import clip, imagereward, row_of, towers
from flowgrpo_jax.types import GraphReward

Rows = dict[str, jax.ShapeDtypeStruct]  # of one prompt


def never(prompts: Any, metadata: Any) -> Any:
    raise ValueError("this reward is only described: `rewards.load` it to prepare prompts")


@functools.cache
def tower(weights: str, kind: Any, config: Any, dtype: str) -> towers.Tower:
    """Describe a tower. Rewards on the same weights share one tower, as they do in `towers`."""
    return towers.describe(kind, config, dtype)


def agreement(
    weights: str, shape: DualConfig, rule: dict[str, Any], dtype: str
) -> tuple[GraphReward, Rows]:
    ids = jax.ShapeDtypeStruct((shape.text.max_position_embeddings,), jnp.int32)
    return clip.agreement(tower(weights, CLIP, shape, dtype), dtype, never, **rule), {"ids": ids}


def aesthetic(dtype: str) -> tuple[GraphReward, Rows]:
    head = tower("head", Head, VIT_L_14.vision.projection_dim, "float32")
    return clip.beauty(tower("clip_l", CLIP, VIT_L_14, dtype), dtype, head), {}


def similarity(dtype: str) -> tuple[GraphReward, Rows]:
    side = VIT_L_14.vision.image_size
    pixels = jax.ShapeDtypeStruct((side, side, 3), jnp.float32)
    return clip.similarity(tower("clip_l", CLIP, VIT_L_14, dtype), dtype, never), {"pixels": pixels}


def reading(dtype: str) -> tuple[GraphReward, Rows]:
    shape = (imagereward.LENGTH,)
    rows = {
        "ids": jax.ShapeDtypeStruct(shape, jnp.int32),
        "mask": jax.ShapeDtypeStruct(shape, bool),
    }
    return imagereward.reading(
        tower("imagereward", ImageReward, BLIPConfig(), dtype), dtype, never
    ), rows


TABLE: dict[str, Callable[[str], tuple[GraphReward, Rows]]] = {
    "pickscore": lambda dtype: agreement("pickscore", VIT_H_14, clip.PICKSCORE, dtype),
    "clipscore": lambda dtype: agreement("clip_l", VIT_L_14, clip.CLIPSCORE, dtype),
    "hpsv2": lambda dtype: agreement("hpsv2", VIT_H_14, clip.HPSV2, dtype),
    "aesthetic": aesthetic,
    "image_similarity": similarity,
    "imagereward": reading,
}


def describe(
    names: Iterable[str], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[GraphReward, Rows]]:
    """Describe the named rewards that run in the graph, and their inputs for a prompt."""
    found = {}
    for name in names:
        row = row_of(name)
        if row in TABLE:
            chosen = {**options.get(row, {}), **options.get(name, {})}
            found[name] = TABLE[row](chosen.get("dtype", "float32"))
    return found
