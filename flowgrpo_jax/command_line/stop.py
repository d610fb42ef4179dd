"""A signal that asks a run to stop, and what the loop does about it."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from flowgrpo_jax import sharding

ECHO = 2.0  # seconds within which a second signal is the first one, come by another way


class Stopped(Exception):
    """The run was asked to stop; its argument is the signal's number."""


class Stop:
    """Turns SIGINT and SIGTERM into a request that the loop reads between programs.

    A second signal interrupts at once, unless it is an echo: Ctrl-C goes to the whole process
    group, and a launcher passes it on as well. `requested` is the signal's number, 0 before there
    is one.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = 0
        self._since = 0.0

    def check(self) -> None:
        """Raise Stopped if any process has been asked to stop. All processes must call this."""
        if number := int(sharding.allgather(np.array(self.requested)).max()):
            raise Stopped(number)

    def wait(self, pending: Sequence[Future[Any]]) -> list[Any]:
        """Return the results of futures once the futures of all processes are done.

        A request to stop that reaches any process ends the wait with Stopped. All processes must
        call this together; the number of their futures may differ.
        """
        while not sharding.allgather(np.array(not wait(pending, 1.0).not_done)).all():
            self.check()
        return [future.result() for future in pending]

    def __enter__(self) -> Stop:
        self._previous = {s: signal.signal(s, self._request) for s in self.signals}
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = number, time.monotonic()
            print(f"\n{signal.Signals(number).name}: saving and stopping", flush=True)
        elif time.monotonic() - self._since > ECHO:
            raise KeyboardInterrupt

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
