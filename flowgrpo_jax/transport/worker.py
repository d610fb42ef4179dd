"""The thread in which a reward server scores: one batch at a time, of all requests that wait."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgrpo_jax.types import GraphReward, Metadata, Reward, scope_of

log = logging.getLogger(__name__)

Scores = tuple[np.ndarray, np.ndarray]


class Job(NamedTuple):
    images: np.ndarray
    prompts: Sequence[str]
    metadata: Sequence[Metadata]
    result: Future[Scores]


class Worker(threading.Thread):
    """Loads the reward, then scores what is submitted, one batch at a time."""

    def __init__(self, load: Callable[[], Reward | GraphReward], batch: int, waiting: int):
        """
        Args:
          batch: images of requests that are scored together at most.
          waiting: requests that may wait.
        """
        super().__init__(daemon=True)
        self.load, self.batch, self.waiting = load, batch, waiting
        self.ready, self.scope = False, "image"
        self.on_error: Callable[[BaseException], None] = lambda error: None
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()

    def submit(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Future[Scores] | None:
        """The scores to come; None if too many wait already."""
        with self._changed:
            if sum(not job.result.cancelled() for job in self._jobs) >= self.waiting:
                return None
            job = Job(images, prompts, metadata, Future())
            self._jobs.append(job)
            self._changed.notify()
        return job.result

    def run(self) -> None:
        try:
            loaded = self.load()
            reward = on_host(loaded) if isinstance(loaded, GraphReward) else loaded
            self.scope, self.ready = scope_of(reward), True
            while True:
                self._score(reward, self._next())
        except BaseException as error:  # a server without its worker would accept and never answer
            self.ready = False
            self.on_error(error)

    def _next(self) -> list[Job]:
        """The first request that waits, and those after it of the same size that fit.

        A request to a group or epoch reward is one group or epoch, which is scored by itself.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._jobs)
            jobs = [self._jobs.popleft()]
            size = len(jobs[0].images)
            while self._follows(jobs[0]):
                size += len(self._jobs[0].images)
                if size > self.batch:
                    break
                jobs.append(self._jobs.popleft())
        return jobs

    def _follows(self, job: Job) -> bool:
        """Return whether the next request may be scored together with this one."""
        if not self._jobs or self.scope != "image":
            return False
        return self._jobs[0].images.shape[1:] == job.images.shape[1:]

    def _score(self, reward: Reward, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.result.cancelled()]
        if not jobs:
            return
        images = np.concatenate([job.images for job in jobs])
        prompts = [prompt for job in jobs for prompt in job.prompts]
        metadata = [record for job in jobs for record in job.metadata]
        try:
            raw_scores, raw_valid = reward(images, prompts, metadata)
            scores, valid = np.asarray(raw_scores, np.float32), np.asarray(raw_valid, bool)
            if scores.shape != (len(images),) or valid.shape != (len(images),):
                raise ValueError(
                    f"the reward returned shapes {scores.shape} and {valid.shape} for"
                    f" {len(images)} images: it must return a score and a bool for each"
                )
        except Exception as error:
            if len(jobs) > 1:  # one of them may be at fault: the others should not pay for it
                for job in jobs:
                    self._score(reward, [job])
                return
            log.warning("the reward failed on %d images", len(images), exc_info=True)
            _settle(jobs[0].result, error)
            return
        ends = np.cumsum([len(job.images) for job in jobs])[:-1]
        for job, *result in zip(jobs, np.split(scores, ends), np.split(valid, ends)):
            _settle(job.result, tuple(result))


def _settle(future: Future[Scores], outcome: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def on_host(reward: GraphReward) -> Reward:
    """An in-graph reward as one that takes any number of images.

    Batches are filled up to a power of two, so that few sizes are compiled.
    """
    score = jax.jit(reward.score)
    weights = jax.device_put(reward.weights)

    def call(
        images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        n = len(images)
        rows = np.minimum(np.arange(1 << (n - 1).bit_length()), n - 1)
        prepared = reward.prepare([prompts[i] for i in rows], [metadata[i] for i in rows])
        scores = np.asarray(score(weights, images[rows], prepared), np.float32)[:n]
        return scores, np.isfinite(scores)

    return call
