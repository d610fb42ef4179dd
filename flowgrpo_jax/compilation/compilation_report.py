"""A report of what is being compiled, while it is."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import jax
from tqdm import tqdm

COMPILE = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event
FIRST, AGAIN = 2.0, 30.0  # seconds until a compilation is reported, and between further lines


@dataclass
class Compilation:
    """A program that is being compiled: its name, and times in seconds of a monotonic clock."""

    name: str
    began: float
    said: float = 0.0  # when the last line about it was written; 0: never


class Report:
    """Tells on a stream what is being compiled, and for how long already.

    On a terminal one line is updated every second and removed at the end; otherwise there is a
    line when a compilation has taken a while, one every half minute, and one when it is done.
    Programs that come from the cache, or compile quickly, are not mentioned.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._running: dict[int, Compilation] = {}  # by thread
        self._line: tqdm | None = None
        self._lock = threading.Lock()
        self.changed = threading.Event()

    def begin(self, name: str, now: float) -> None:
        with self._lock:
            program = name.removeprefix("jit(").removesuffix(")")
            self._running[threading.get_ident()] = Compilation(program, now)
        self.changed.set()

    def end(self, now: float) -> None:
        with self._lock:
            done = self._running.pop(threading.get_ident(), None)
            if self._line is not None:
                self._line.close()
                self._line = None
            elif done and done.said:
                self._write(f"compiled {done.name} in {now - done.began:.0f} s")

    def show(self, now: float) -> bool:
        """Say what there is to say; returns whether anything is being compiled."""
        with self._lock:
            for job in list(self._running.values())[:1]:
                seconds = now - job.began
                text = f"compiling {job.name}: {seconds:.0f} s"
                if seconds < FIRST:
                    continue
                if self._stream.isatty():
                    if self._line is None:
                        form = {"bar_format": "{desc}", "leave": False}
                        self._line = tqdm(file=self._stream, **form)
                    self._line.set_description_str(text)
                elif not job.said or now - job.said >= AGAIN:
                    self._write(text)
                    job.said = now
            return bool(self._running)

    def _write(self, text: str) -> None:
        tqdm.write(text, file=self._stream)
        self._stream.flush()


@contextmanager
def reported(stream: TextIO | None = None) -> Iterator[None]:
    """Tell on standard error, in the first process of a run, what is compiled inside."""
    report = Report(stream or sys.stderr)
    closed = False

    def on_begin(event: str, value: float, **details: Any) -> None:
        if event == COMPILE and jax.process_index() == 0:
            report.begin(details.get("fun_name", "a program"), time.monotonic())

    def on_end(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE:
            report.end(time.monotonic())

    def watch() -> None:
        while not closed:
            busy = report.show(time.monotonic())
            report.changed.wait(1.0 if busy else None)
            report.changed.clear()

    jax.monitoring.register_scalar_listener(on_begin)
    jax.monitoring.register_event_duration_secs_listener(on_end)
    thread = threading.Thread(target=watch, name="compilation report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed = True
        report.changed.set()
        thread.join()
        jax.monitoring.unregister_scalar_listener(on_begin)
        jax.monitoring.unregister_event_duration_listener(on_end)
