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
    used = _colours(images)
    if not any(found := used >= 0):
        return np.zeros(len(images), np.float32), np.zeros(len(images), bool)
    counts = np.bincount(used[found], minlength=len(COLORS))
    return np.full(len(images), _balance(counts), np.float32), np.ones(len(images), bool)


def fairness(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """What each image adds to the balance of all images of the epoch: the balance with it minus
    that without it, times the number of images that count.

    An image of a rare colour scores above 0 and one of a common colour below. An image without a
    clear object adds nothing.
    """
    used = _colours(images)
    counts = np.bincount(used[used >= 0], minlength=len(COLORS))
    total, score = counts.sum(), np.zeros(len(images), np.float32)
    if total > 1:
        without = [_balance(counts - one) if count else 0.0 for count, one in zip(counts, _EACH)]
        score = total * (_balance(counts) - np.array([*without, _balance(counts)])[used])
    return score.astype(np.float32), np.ones(len(images), bool)


_EACH = np.eye(len(COLORS), dtype=int)  # one image of each colour


def _colours(images: np.ndarray) -> np.ndarray:
    """Return the place in COLORS of each image's first clear object, i64 [B]; -1 where none is."""
    found = [next((d.color for d in verify.detect(image) if d.color), None) for image in images]
    return np.array([COLORS.index(color) if color else -1 for color in found])


def _balance(counts: np.ndarray) -> float:
    """Return the balance of so many images of each colour."""
    return -float(np.square(counts / counts.sum() - 1 / len(COLORS)).sum())


wins.scope = balance.scope = "group"  # type: ignore[attr-defined]
fairness.scope = "epoch"  # type: ignore[attr-defined]
wins.check = check  # type: ignore[attr-defined]
