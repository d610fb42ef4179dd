"""Measure the time from a start to its first work: first start, second start, resume, drawing.

    python -m benchmarks.starts --out benchmarks/results/starts.json

Runs the commands of `configs/shapes.py` in processes of their own, with an empty cache of compiled
programs, one after the other:

  cold       train; the first epoch ends when its row is in metrics.jsonl;
  second     train in another work directory, with what `cold` left in the cache;
  resume     the run of `second` for another epoch;
  generate   one picture of the base model; it begins to draw when its program is called;
  evaluate   the evaluation of the base model, likewise.

The last two are run twice, and the second time counts: `cold` does not compile what they need.
Training runs without evaluation (`eval.every=0`), which would come before the first epoch. Each
command is measured from its start: seconds until the event and until its end, and the processor
seconds of its processes, user and system, which tell more where others use the machine as well. An
epoch without compilation is measured for comparison.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine

CONFIG = ["--config", "shapes"]
DRAWS = "begins to draw"
# Runs a command's module as `python -m` does, and says when the program that draws is called first.
WATCHED = f"""
import runpy, sys
from flowgrpo_jax import programs
make = programs.generate
def generate(*arguments, **settings):
    program = make(*arguments, **settings)
    def call(*inputs):
        images = program(*inputs)  # returns when the program has been compiled and started
        print({DRAWS!r}, flush=True)
        return images
    return call
programs.generate = generate
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class Command:
    """A command that is being run, its output in a file."""

    def __init__(self, arguments: list[str], folder: Path, **variables: str):
        self.log = folder / f"{time.monotonic_ns()}.log"
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        with self.log.open("w") as log:
            self.begun = time.perf_counter()
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=machine.ROOT,
                env=os.environ | cache | variables,
            )

    def measure(self, event: Callable[[], bool]) -> dict[str, float]:
        """Wait for the event and for the end: seconds since the start, and processor seconds.

        Raises RuntimeError with the end of the log when the command fails or skips the event.
        """
        seen = None
        while True:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if seen is None and event():
                seen = time.perf_counter() - self.begun
            if pid:
                break
            time.sleep(0.02)
        ended = time.perf_counter() - self.begun
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode or seen is None:
            end = "\n".join(self.log.read_text().splitlines()[-12:])
            raise RuntimeError(f"{self._process.args} ended with {status}:\n{end}")
        return {
            "event": seen,
            "end": ended,
            "user": usage.ru_utime,
            "system": usage.ru_stime,
        }


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The epochs that a run has finished."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def train(folder: Path, name: str, epochs: int, *more: str) -> dict[str, float]:
    """Train up to `epochs`; the event is the end of the first epoch of this start."""
    workdir = folder / name
    before = len(rows(workdir))
    arguments = ["-m", "flowgrpo_jax.train", *CONFIG, f"--workdir={workdir}"]
    settings = ["--config.eval.every=0", f"--config.epochs={epochs}", *more]
    return Command([*arguments, *settings], folder).measure(lambda: len(rows(workdir)) > before)


def draw(folder: Path, module: str, *arguments: str) -> dict[str, float]:
    """Run a command that draws; the event is the first call of its program."""
    # They restart for huge pages otherwise, and the code that watches would import all twice.
    variables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = Command(["-c", WATCHED, module, *arguments], folder, **variables)
    return command.measure(lambda: DRAWS in command.log.read_text())


def measure(folder: Path) -> tuple[dict[str, dict[str, float]], float]:
    """All starts, and the seconds of an epoch for which nothing is compiled."""
    picture = ["--prompt=a red circle", f"--out={folder / 'picture.png'}"]
    scores = [*CONFIG, f"--out={folder / 'scores.json'}"]
    starts = {
        "cold": lambda: train(folder, "cold", 1),
        "second": lambda: train(folder, "run", 1),
        "resume": lambda: train(folder, "run", 3, "--resume"),
        "generate, cold": lambda: draw(folder, "flowgrpo_jax.generate", *picture),
        "generate": lambda: draw(folder, "flowgrpo_jax.generate", *picture),
        "evaluate, cold": lambda: draw(folder, "flowgrpo_jax.evaluate", *scores),
        "evaluate": lambda: draw(folder, "flowgrpo_jax.evaluate", *scores),
    }
    found = {}
    for name, start in starts.items():
        found[name] = start()
        print(f"{name}: {found[name]['event']:.1f} s", flush=True)
    return found, rows(folder / "run")[-1]["seconds"]


def table(starts: dict[str, dict[str, float]]) -> str:
    """The figures in Markdown."""
    lines = ["| start | event, s | end, s | user, s | system, s |", "|---|---|---|---|---|"]
    for name, row in starts.items():
        lines.append(f"| {name} | " + " | ".join(f"{x:.1f}" for x in row.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        starts, epoch = measure(Path(folder))
    print(f"\n{table(starts)}\n\nan epoch without compilation: {epoch:.1f} s; load before: {load}")
    if args.out:
        report = {
            "machine": machine.described("cpu"),
            "load": load,
            "starts": starts,
            "epoch": epoch,
        }
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
