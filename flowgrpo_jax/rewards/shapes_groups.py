"""Rewards of the shapes world that judge all images of a prompt, or of an epoch, together.

`wins` is Pref-GRPO's win rate (arXiv 2508.20751) with the verifier as the judge of each pair.
`balance` is the distribution reward of Pinterest's large-scale RL (arXiv 2401.12244, section 4.2)
with the colours of the world in place of skin tones. It gives all images of a prompt one score, so
that it needs an advantage that compares prompts: `advantage.name="batch"`. `fairness` is the same
distribution over all images of an epoch, and tells what each image adds to it; this division among
the images is ours.
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
    """Return the share of the other images of its prompt that each image beats, from 0 to 1.

    A tie counts as a half.
    """
    score, valid = graded(images, prompts, metadata)
    beats = np.where(score[:, None] == score, 0.5, score[:, None] > score)
    np.fill_diagonal(beats, 0.0)
    return (beats.sum(1) / max(len(score) - 1, 1)).round(3).astype(np.float32), valid


def balance(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """Return how evenly the colours of the world are used, the same score for all images.

    It is minus the sum over colours of the squared distance of each one's share from 1 / colours,
    so that 0 is the best. An image counts with the colour of its first clear object. No image is
    valid where none has one.
    """
    counts = _count(_colours(images))
    if not counts.any():
        return np.zeros(len(images), np.float32), np.zeros(len(images), bool)
    return np.full(len(images), _balance(counts), np.float32), np.ones(len(images), bool)


def fairness(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """Return what each image adds to the balance of all images of the epoch.

    It is the balance with the image minus that without it, times the number of images that count.
    An image of a rare colour scores above 0 and one of a common colour below. An image without a
    clear object adds nothing.
    """
    used = _colours(images)
    counts = _count(used)
    total, score = counts.sum(), np.zeros(len(images), np.float32)
    if total > 1:
        for color in np.flatnonzero(counts):
            without = counts - (np.arange(len(COLORS)) == color)
            score[used == color] = total * (_balance(counts) - _balance(without))
    return score, np.ones(len(images), bool)


def _colours(images: np.ndarray) -> np.ndarray:
    """Return the place in COLORS of each image's first clear object, i64 [B]; -1 where none is."""
    found = [next((d.color for d in verify.detect(image) if d.color), None) for image in images]
    return np.array([COLORS.index(color) if color else -1 for color in found])


def _count(used: np.ndarray) -> np.ndarray:
    """Return how many images have each colour, i64 [colours]."""
    return np.bincount(used[used >= 0], minlength=len(COLORS))


def _balance(counts: np.ndarray) -> float:
    """Return the balance of so many images of each colour."""
    return -float(np.square(counts / counts.sum() - 1 / len(COLORS)).sum())


wins.scope = balance.scope = "group"  # type: ignore[attr-defined]
fairness.scope = "epoch"  # type: ignore[attr-defined]
wins.check = check  # type: ignore[attr-defined]
