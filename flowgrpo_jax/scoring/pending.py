"""Scores that come while the images are drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgrpo_jax import sharding
from flowgrpo_jax.scoring import host
from flowgrpo_jax.scoring.host_pictures import HostPictures
from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.scoring.scores import RowScores, Scores, merged, sample_of
from flowgrpo_jax.types import NamedScores, Pictures

SAMPLE = 24  # images that are kept for people to look at


class Call(NamedTuple):
    """One call of a group or epoch reward."""

    reward: str
    rows: np.ndarray  # i64 [n], ascending


class PendingScores:
    """The scores of B images, which are added micro-batch by micro-batch as they are drawn.

    A context manager: at its end, calls of rewards that still wait are dropped, and those that are
    running are not waited for. All processes of a run must add the same micro-batches, and collect,
    together.

    Image rewards score a micro-batch while the next one is drawn, each process the images that it
    holds. A group is scored as soon as its last image is there, and an epoch after its last image,
    by one process each, whatever the cut into micro-batches. These calls lack images that are not
    finite, which would otherwise change the scores of the others.
    """

    def __init__(self, scorer: Scorer, ids: np.ndarray, *, keep_pixels: bool = False):
        """
        Args:
          ids: i32 [B], the number of each image's prompt in the scorer's records.
          keep_pixels: keep the pixels in `pictures` even if no reward needs them there.
        """
        self.scorer, self.ids = scorer, ids
        keep_pixels = keep_pixels or bool(scorer.joint_rewards)
        self.pictures = HostPictures(len(ids), scorer.mesh, keep_pixels=keep_pixels)
        calls = calls_of(scorer.joint_rewards, ids)[jax.process_index() :: jax.process_count()]
        self._calls = sorted(calls, key=lambda call: call.rows[-1])  # of this process
        self._added = 0  # images, with their padding
        self._sample: list[jax.Array] = []  # pixels of the first micro-batches
        self._scored: list[RowScores] = []  # by programs
        self._futures: list[Future[RowScores]] = []
        self._pool = ThreadPoolExecutor(scorer.threads)
        self.calls: list[tuple[float, float]] = []  # when the host's rewards began and ended

    def __enter__(self) -> PendingScores:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def add(
        self, pictures: Pictures, prepared: Any, rows: Any, scored: NamedScores | None = None
    ) -> None:
        """Add the next micro-batch of M images; those after the B-th are padding.

        Args:
          prepared, rows: what `Scorer.prepare` returned, and each image's row in it, i32 [M].
          scored: the host's image rewards, where the program that drew the images called them.
        """
        size = pictures.finite.shape[0]
        here = np.arange(self._added, min(self._added + size, len(self.ids)))
        self._added += size
        if here.size and here[0] < SAMPLE:
            self._sample.append(pictures.pixels)
        self._scored.append((here, self.scorer.in_graph(pictures.pixels, prepared, rows)))
        if scored:
            self._scored.append((here, scored))
        elif self.scorer.image_rewards:
            self._submit(self._score_own, here, pictures.pixels)
        self.pictures.add(pictures)
        self._score_complete()

    def collect(self, wait: Callable[[Sequence[Future[Any]]], list[Any]]) -> Scores:
        """Return the scores of all images.

        Args:
          wait: returns the results of futures; all processes call it together (`Stop.wait`).
        """
        self.pictures.fetch()
        self._score_complete()
        names, images = self.scorer.weights.names, len(self.ids)
        values = merged(names, images, [*wait(self._futures), *self._scored])
        weights = self.scorer.weights.table(self.scorer.lookup(self.ids))
        valid = ~np.isnan(weights) & self.pictures.finite
        values = np.where(valid, values, np.nan)
        sample = sample_of(self._sample, min(SAMPLE, images))
        return Scores(names, values, weights, self.pictures.finite, sample)

    def _submit(self, work: Callable[..., RowScores], *batch: Any) -> None:
        self._futures.append(host.submit(self._pool, work, *batch))

    def _score_own(self, here: np.ndarray, images: jax.Array) -> RowScores:
        """Score the images of a micro-batch that this process holds with the image rewards."""
        rows, pixels = sharding.own_rows(images)
        rows = here[rows[rows < len(here)]]
        score = self.scorer.on_host(self.scorer.image_rewards)
        return rows, timed(self.calls, score, pixels[: len(rows)], self.ids[rows])

    def _score_complete(self) -> None:
        """Begin the calls whose images are all here."""
        while self._calls and self._calls[0].rows[-1] < self.pictures.count:
            self._submit(self._score_joint, self._calls.pop(0))

    def _score_joint(self, call: Call) -> RowScores:
        rows = call.rows[self.pictures.finite[call.rows]]
        score = self.scorer.on_host((call.reward,))
        return rows, timed(self.calls, score, self.pictures.pixels[rows], self.ids[rows])


def timed(calls: list[tuple[float, float]], score: host.Score, *batch: Any) -> NamedScores:
    """Return score(*batch), and append to `calls` when it began and ended, even where it raises.

    The images are on the host by then: to wait until they are drawn is no time of a reward.
    """
    begun = time.perf_counter()
    try:
        return score(*batch)
    finally:
        calls.append((begun, time.perf_counter()))


def calls_of(scopes: Mapping[str, str], ids: np.ndarray) -> list[Call]:
    """Return the calls of group and epoch rewards, {reward: scope}, for images of prompts `ids`.

    Images of equal ids, i32 [B], are a group, wherever they are.
    """
    groups = [np.flatnonzero(ids == i) for i in np.unique(ids)]
    together = {"group": groups, "epoch": [np.arange(len(ids))]}
    return [Call(name, rows) for name, scope in scopes.items() for rows in together[scope]]
