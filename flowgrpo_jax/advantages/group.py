"""The deviation from the group's mean: of Flow-GRPO (arXiv 2505.05470), DeepSeekMath (arXiv
2402.03300) and Dr. GRPO (arXiv 2503.20783)."""

from __future__ import annotations

import jax

from flowgrpo_jax.advantages import Advantage, Memory, normalised, weighted


def group(group_size: int, clip: float) -> Advantage:
    """The deviation from the group's mean, divided by the group's standard deviation."""
    return _of_sum(group_size, clip, "group")


def over_all(group_size: int, clip: float) -> Advantage:
    """The deviation from the group's mean, divided by the standard deviation over all images."""
    return _of_sum(group_size, clip, "global")


def undivided(group_size: int, clip: float) -> Advantage:
    """The deviation from the group's mean (Dr. GRPO, arXiv 2503.20783)."""
    return _of_sum(group_size, clip, "none")


def _of_sum(group_size: int, clip: float, std: str) -> Advantage:
    def compute(
        memory: Memory, scores: jax.Array, weights: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, Memory]:
        total, valid = weighted(scores, weights)
        return normalised(total, valid, group_size=group_size, std=std, clip=clip), memory

    return Advantage(compute)
