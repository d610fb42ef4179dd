"""The scores of an epoch or of an evaluation: what every reward gave every image."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np


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
