"""Rewards of the shapes world: GenEval's rule over what the verifier sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowgrpo_jax.detection import rule
from flowgrpo_jax.types import Metadata
from flowgrpo_jax.worlds.shapes import grammar, verify
from flowgrpo_jax.worlds.shapes.render import COLORS, SHAPES

Scores = tuple[np.ndarray, np.ndarray]


def graded(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """GenEval's graded score, 0 to 1; what training climbs."""
    return _all([verify.judge(i, m).graded for i, m in zip(images, metadata)])


def strict(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """1 where the picture shows exactly what the prompt says, else 0; what evaluation counts."""
    return _all([float(verify.judge(i, m).strict) for i, m in zip(images, metadata)])


def unknown(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    """Share of a picture's objects that are no recognisable shape, 0 to 1; lower is better."""
    found = [[d.cls == verify.UNKNOWN for d in verify.detect(image)] for image in images]
    return _all([float(np.mean(bad)) if bad else 0.0 for bad in found])


def check(record: Metadata) -> None:
    """Raise ValueError, naming the value, for metadata that no prompt of this world has."""
    counts = range(1, max(grammar.COUNTS) + 2)  # `exclude` names one more than is asked for
    rule.check(record, classes=SHAPES, counts=counts, colors=COLORS)


# Both rewards check the metadata of every prompt before training.
graded.check = strict.check = check  # type: ignore[attr-defined]


def _all(scores: list[float]) -> Scores:
    return np.asarray(scores, np.float32), np.ones(len(scores), bool)
