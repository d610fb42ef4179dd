"""The seconds that an epoch spends in each of its stages, and a trace of one epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import jax
from etils import epath


class Stages:
    """A clock of an epoch and its stages: `with stages("sample"): ...` adds to that stage."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}  # when each stage last began
        self._hidden = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._began[name] = begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def count_rewards(self, calls: Sequence[tuple[float, float]]) -> None:
        """Add the stage "rewards", by when each of their calls on the host began and ended."""
        self.seconds["rewards"] = sum(end - begun for begun, end in calls)
        waited = self._began.get("wait", math.inf)
        self._hidden = sum(max(min(end, waited) - begun, 0.0) for begun, end in calls)

    def figures(self) -> dict[str, float]:
        """Return the seconds since the start and of each stage.

        `hidden_rewards` is the share of the rewards' time on the host, summed over their threads,
        that had passed when the epoch began to wait for them.
        """
        figures = {f"seconds/{name}": seconds for name, seconds in self.seconds.items()}
        figures["seconds"] = time.perf_counter() - self.begun
        if rewards := self.seconds.get("rewards"):
            figures["hidden_rewards"] = self._hidden / rewards
        return figures


@contextmanager
def traced(directory: epath.Path, on: bool) -> Iterator[None]:
    """Write a trace of what the devices do inside to a directory, with `on`."""
    with jax.profiler.trace(str(directory)) if on else nullcontext():
        yield
