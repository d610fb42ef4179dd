"""Rewards of the shapes world that judge all images of a prompt together.

`wins` is Pref-GRPO's win rate (arXiv 2508.20751) with the verifier as the judge of each pair.
`balance` is the distribution reward of Pinterest's large-scale RL (arXiv 2401.12244, section 4.2)
with the colours of the world in place of skin tones. It gives all images of a prompt one score, so
that it needs an advantage that compares prompts: `advantage.name="batch"`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowgrpo_jax.rewards.shapes import check, graded
from flowgrpo_jax.types import Metadata
from flowgrpo_jax.worlds.shapes import verify
from flowgrpo_jax.worlds.shapes.render import COLORS

Scores = tuple[np.ndarray, np.ndarray]


def wins(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """The share of the other images of the prompt that an image beats, 0 to 1; a tie is a half."""
    score, valid = graded(images, prompts, metadata)
    beats = np.where(score[:, None] == score, 0.5, score[:, None] > score)
    np.fill_diagonal(beats, 0.0)
    return (beats.sum(1) / max(len(score) - 1, 1)).round(3).astype(np.float32), valid


def balance(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """How evenly the colours of the world are used: minus the sum over colours of the squared
    distance of each one's share from 1 / colours, the same for all images; 0 is the best.

    An image counts with the colour of its first clear object. No image is valid where none has one.
    """
    found = [next((d.color for d in verify.detect(i) if d.color), None) for i in images]
    seen = [COLORS.index(color) for color in found if color]
    if not seen:
        return np.zeros(len(images), np.float32), np.zeros(len(images), bool)
    shares = np.bincount(seen, minlength=len(COLORS)) / len(seen)
    score = -np.square(shares - 1 / len(COLORS)).sum()
    return np.full(len(images), score, np.float32), np.ones(len(images), bool)


wins.scope = balance.scope = "group"  # type: ignore[attr-defined]
wins.check = check  # type: ignore[attr-defined]
