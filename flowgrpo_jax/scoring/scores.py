"""The scores of an epoch or of an evaluation: what every reward gave every image."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from flowgrpo_jax import sharding
from flowgrpo_jax.types import NamedScores

RowScores = tuple[np.ndarray, NamedScores]  # rows i64 [n] of the B images, scores f32 [n] each


class Sample(NamedTuple):
    """A few of the images, for people to look at: those of the first that this process holds."""

    rows: np.ndarray  # i64 [n], which of the B images they are
    pixels: np.ndarray  # uint8 [n, H, W, 3]


class Scores(NamedTuple):
    """The scores of B images by K rewards, on the host of every process alike."""

    names: tuple[str, ...]  # of the K rewards
    values: np.ndarray  # f32 [K, B], unweighted; NaN where a reward failed or does not apply
    weights: np.ndarray  # f32 [K, B]; NaN where a reward does not apply to the image's prompt
    finite: np.ndarray  # bool [B], whether all pixels are finite; other images have no score
    sample: Sample | None = None  # a few of the images

    @property
    def failed(self) -> np.ndarray:
        """Tell where a reward that applies has no score: bool [K, B]."""
        return np.isnan(self.values) & ~np.isnan(self.weights)

    @property
    def broken(self) -> float:
        """The share of the images that are not finite."""
        return 1.0 - float(self.finite.mean())

    def of(self, images: np.ndarray) -> Scores:
        """Return the scores of some of the images, bool [B]."""
        return Scores(
            self.names, self.values[:, images], self.weights[:, images], self.finite[images]
        )

    def means(self) -> dict[str, float]:
        """Return the mean of each reward over the images that have its score."""
        return {name: mean(values) for name, values in zip(self.names, self.values)}

    def errors(self) -> dict[str, float]:
        """Return the standard error of each mean: how far it is from that of endless images."""
        return {name: standard_error(values) for name, values in zip(self.names, self.values)}


def sample_of(parts: Iterable[jax.Array], most: int) -> Sample:
    """Return those of the first `most` images that this process holds.

    Args:
      parts: their pixels, uint8 [M, H, W, 3] of each micro-batch in order; there is at least one.
    """
    samples, begin = [], 0
    for pixels in parts:
        rows, own = sharding.own_rows(pixels)
        kept = begin + rows < most
        samples.append(Sample(begin + rows[kept], own[kept]))
        begin += len(pixels)
    return Sample(*map(np.concatenate, zip(*samples)))


def merged(names: Sequence[str], images: int, parts: Iterable[RowScores]) -> np.ndarray:
    """Return the scores f32 [K, B] of B images by K rewards, from the parts of all processes, which
    call this together; NaN where none of them has a score.

    Args:
      parts: those of this process. An array that is spread over processes is a part of each of
        them; scores beyond the rows are those of padding.
    """
    values = np.full((len(names), images), np.nan, np.float32)
    for rows, part in parts:
        for name, scores in part.items():
            values[names.index(name), rows] = sharding.to_host(scores)[: len(rows)]
    return np.fmax.reduce(sharding.allgather(values))  # NaN: another process scored it


def mean(scores: np.ndarray) -> float:
    """Return the mean over the images that have a score; NaN when there is none."""
    scores = scores[~np.isnan(scores)]
    return float(scores.mean()) if scores.size else float("nan")


def standard_error(scores: np.ndarray) -> float:
    """Return the standard error of the mean over the images that have a score; NaN below two."""
    scores = scores[~np.isnan(scores)]
    return float(scores.std(ddof=1) / scores.size**0.5) if scores.size > 1 else float("nan")


def reward_figures(total: np.ndarray, group_size: int) -> dict[str, float]:
    """Summarise the training reward, f32 [B], which is NaN where scoring failed."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without any score
        spread = np.nan_to_num(np.nanstd(total.reshape(-1, group_size), axis=1))
    return {
        "reward": mean(total),
        "reward_std": float(spread.mean()),
        "dead_groups": float((spread < 1e-6).mean()),  # share of groups without any signal
        "failed": float(np.isnan(total).mean()),
    }
