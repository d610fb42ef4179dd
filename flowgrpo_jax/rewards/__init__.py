"""Reward functions: images in, scores out.

A reward is any callable `(images uint8 [B, H, W, 3], prompts, metadata) -> (scores f32 [B], valid
bool [B])`. To add one: write it in a file of this folder, give it a row in `TABLE`, test it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from flowgrpo_jax.types import Reward

TABLE = {
    "shapes": "flowgrpo_jax.rewards.shapes:graded",
    "shapes_strict": "flowgrpo_jax.rewards.shapes:strict",
    "shapes_unknown": "flowgrpo_jax.rewards.shapes:unknown",
    "jpeg_compressibility": "flowgrpo_jax.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "flowgrpo_jax.rewards.jpeg:incompressibility",
}


def load(names: Iterable[str]) -> dict[str, Reward]:
    """The rewards of these names; nothing is imported before it is asked for."""
    rewards = {}
    for name in names:
        if name not in TABLE:
            raise ValueError(f"reward {name!r} is unknown: choose from {', '.join(sorted(TABLE))}")
        module, _, attribute = TABLE[name].partition(":")
        rewards[name] = getattr(importlib.import_module(module), attribute)
    return rewards
