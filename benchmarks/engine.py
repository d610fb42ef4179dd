"""An engine of benchmarks.epoch: the process that computes it, and how the driver asks it."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.machine import ROOT

ENGINES = {
    "jax": "benchmarks.engine_jax",
    "torch": "benchmarks.engine_torch",
    "torch-compile": "benchmarks.engine_torch",
    "jax-tape": "benchmarks.engine_jax",  # with train.tape
}
HUGEPAGES = "glibc.malloc.hugetlb=1"

Arrays = dict[str, np.ndarray]


class Engine(Protocol):
    """One implementation of the epoch. Every method returns when its work is done."""

    def draw(self) -> Arrays:
        """A micro-batch's rollout: x [W + 1, M, H, W, C] and log_prob [W, M] of its window."""
        ...

    def probe(self, drawn: Arrays) -> Arrays:
        """On such a rollout: the first step's velocity, the images uint8 that x[0] decodes to, and
        the gradient of each factor "lora..."."""
        ...

    def sample(self) -> None:
        """Draw an epoch's trajectories and bring its images to the host as uint8."""
        ...

    def decode(self) -> None:
        """Decode the epoch's latents once more: the second part of `sample`, for itself."""
        ...

    def update(self) -> None:
        """One policy update on the epoch's trajectories."""
        ...

    def device_peak(self) -> float:
        """Most GiB of an accelerator's memory in use so far; 0 on the CPU."""
        ...


def serve(load: Callable[[str, dict[str, Any], Arrays], Engine]) -> None:
    """Be an engine's process: answer each command on stdin with a line of JSON on stdout."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    config = json.loads((folder / "config.json").read_text())
    engine = load(name, config, dict(np.load(folder / "inputs.npz")))
    for command in sys.stdin:
        if command.strip() == "probe":
            np.savez(folder / f"{name}.npz", **engine.probe(shared_rollout(engine, folder)))
            print("{}", file=answers)
        else:
            print(json.dumps(one_epoch(engine)), file=answers)


def shared_rollout(engine: Engine, folder: Path) -> Arrays:
    """Return the rollout that all engines are probed with; the first engine draws it."""
    file = folder / "drawn.npz"
    if not file.exists():
        np.savez(file, **engine.draw())
    drawn = dict(np.load(file))
    drawn["log_prob"][:, ::2] += 0.01  # every other image out of the clip range: that counts too
    return drawn


def one_epoch(engine: Engine) -> dict[str, float]:
    """Seconds of each phase, and the process's peak memory so far in GiB."""
    figures = {}
    for phase in (engine.sample, engine.update, engine.decode):
        begun = time.perf_counter()
        phase()
        figures[phase.__name__] = time.perf_counter() - begun
    figures["epoch"] = figures["sample"] + figures["update"]
    figures["peak_gib"] = engine.device_peak() or resident_peak()
    return figures


def resident_peak() -> float:
    """Most GiB of the host's memory that this process has had."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Worker:
    """An engine's process, stopped whenever it is not asked for anything."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]):
        self.name, self._log = name, folder / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", ENGINES[name], str(folder), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                cwd=ROOT,
                env=environment,
            )

    def ask(self, command: str, patience: float | None = None) -> dict[str, float]:
        """Raises RuntimeError with the end of its log when the process has died, or when it has not
        answered after so many seconds."""
        assert self._process.stdin and self._process.stdout
        answer = ""
        try:
            self._process.send_signal(signal.SIGCONT)
            self._process.stdin.write(command + "\n")
            if not select.select([self._process.stdout], [], [], patience)[0]:
                raise RuntimeError(f"{self.name} has not answered {command!r} in {patience:g} s")
            answer = self._process.stdout.readline()
            if answer:  # otherwise it is ending, and would never end if it were stopped
                self._process.send_signal(signal.SIGSTOP)
        except BrokenPipeError:
            pass
        if not answer:
            end = "\n".join(self._log.read_text().splitlines()[-12:])
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}:\n{end}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def environment(device: str, hugepages: bool) -> dict[str, str]:
    """Return the environment variables of every engine's process."""
    platform = {"cpu": "cpu", "gpu": "cuda"}[device]
    result = dict(os.environ, JAX_PLATFORMS=platform, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    if hugepages:
        tunables = [result.get("GLIBC_TUNABLES", ""), HUGEPAGES]
        result["GLIBC_TUNABLES"] = ":".join(filter(None, tunables))
    return result
