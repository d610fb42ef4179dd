"""Shared parts of the entry points: flags, the work directory, stopping on a signal."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from flowgrpo_jax import sharding
from flowgrpo_jax.command_line import usage, user_errors
from flowgrpo_jax.compilation import compilation_cache, compilation_report
from flowgrpo_jax.scoring import host
from flowgrpo_jax.storage import files, outputs

CONFIG_FILE = "config.json"
RESTART = 75  # exit status after SIGTERM: saved, to be started again (sysexits.h: EX_TEMPFAIL)
ECHO = 2.0  # seconds within which a second signal is the first one, come by another way
MEETING = 10.0  # seconds that a process waits at its end for the others of the run
COORDINATES = ("COORDINATOR", "PROCESSES", "PROCESS")


def define_flags(*, config: bool) -> None:
    """`--config NAME|FILE`, with any knob of it as `--config.section.key=value`."""
    logging.set_verbosity(logging.WARNING)
    if config:
        config_flags.DEFINE_config_file("config", None, "A recipe's name or file (`usage.parse`).")
        flags.mark_flag_as_required("config")


def define_cache_flag() -> None:
    """Define the flag that `compiling` reads."""
    flags.DEFINE_string(
        "compilation_cache",
        compilation_cache.AUTOMATIC,
        "Where compiled programs are kept: a directory, a bucket, auto (the user's cache directory;"
        " the work directory if it is in a bucket or of several processes) or off.",
    )


@contextmanager
def compiling(workdir: epath.PathLike | None = None) -> Iterator[None]:
    """Keep compiled programs where the flags say it, and report what is being compiled.

    `workdir` is that of a run. To be entered after `connect`, before the first compilation.
    """
    place = epath.Path(workdir) if workdir else None
    compilation_cache.start(flags.FLAGS.compilation_cache, place)
    with compilation_report.reported():
        yield


def run(main: Callable[[list[str]], None]) -> None:
    """Run an entry point: read its flags, and end with one line for a user's mistake, and with the
    status that is meant though a program or a reward is still at work."""
    with user_errors.in_one_line():
        app.run(ending()(main), flags_parser=usage.parse)


CLUSTERS = {  # environment variable -> does it say that there are several processes?
    "SLURM_NTASKS": lambda value: int(value) > 1,
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
    "MEGASCALE_NUM_SLICES": lambda value: int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
    "FLOWGRPO_POD": bool,  # launch/tpu_pod.sh: only a metadata server knows there, JAX asks it
}


def connect() -> None:
    """Join the other processes of the run, if there are any. The first thing an entry point does.

    JAX finds them by itself on TPU pods, under SLURM and under Open MPI. Elsewhere (Kubernetes,
    ssh) say it with FLOWGRPO_COORDINATOR=HOST:PORT, FLOWGRPO_PROCESSES=N and FLOWGRPO_PROCESS=i. A
    process has all GPUs that it can see; of several under SLURM or Open MPI that see the same ones,
    each has the one of its number on the machine.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM; `Stop` does that
    own = {name: os.environ.get(f"FLOWGRPO_{name}") for name in COORDINATES}
    given = [name for name, value in own.items() if value]
    if given and len(given) < len(COORDINATES):
        absent = [f"FLOWGRPO_{name}" for name in COORDINATES if name not in given]
        raise ValueError(f"to join a run of several processes also set {', '.join(absent)}")
    if given:
        jax.distributed.initialize(
            own["COORDINATOR"],
            int(own["PROCESSES"] or 1),
            int(own["PROCESS"] or 0),
            # all is said: started from within a SLURM job JAX would still take one GPU, as below
            cluster_detection_method="deactivate",
        )
    elif any(several(os.environ[name]) for name, several in CLUSTERS.items() if name in os.environ):
        jax.distributed.initialize(local_device_ids=[] if has_all_devices() else None)


def has_all_devices() -> bool:
    """Return whether all GPUs that this process of SLURM or Open MPI can see are its own.

    By default JAX expects one process per GPU and gives a process the GPU of its number on the
    machine. A single process would then leave seven of eight GPUs idle, and process 5, if it sees
    only its own GPU as number 0, would not find number 5.
    """
    env = os.environ
    if "JAX_LOCAL_DEVICE_IDS" in env:
        return False
    gpus = env.get("CUDA_VISIBLE_DEVICES", "")
    if gpus and "," not in gpus:
        return True
    if "OMPI_COMM_WORLD_SIZE" in env:  # before SLURM, as JAX does: mpirun works in SLURM's jobs
        return env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    # every node of a step has a task, so as many tasks as nodes are one on each
    return "SLURM_NTASKS" in env and env["SLURM_NTASKS"] == env.get("SLURM_STEP_NUM_NODES")


@contextmanager
def ending() -> Iterator[None]:
    """Let a whole program end with the status that it means to end with. `run` does so.

    After Ctrl-C, SIGTERM or a reward that does not return, threads may still be inside of compiled
    programs or of a reward. Python's own shutdown can kill such a process by SIGSEGV or SIGABRT, or
    wait for ever. So it ends without that shutdown, once everything has been saved.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        leave(-signal.SIGINT)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise  # a message for the user, which Python prints
        leave(end.code or 0)
    except BaseException:
        if not host.hung():
            raise
        traceback.print_exc()
        leave(1)
    else:
        if host.hung():
            leave(0)


def leave(status: int) -> None:
    """End this process at once, by the signal `-status` if `status` is negative."""
    for number in Stop.signals:  # the echo of a signal must not change the status any more
        signal.signal(number, signal.SIG_IGN)
    if any(not call.done() for call in tuple(host.running)):
        print("a reward has not returned: leaving without it", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():  # the other processes meet this one there
        meeting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        meeting.start()
        meeting.join(MEETING)
    if status < 0:  # so that a shell, too, sees the Ctrl-C and does not go on with its script
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


@contextmanager
def exit_for_restart() -> Iterator[None]:
    """Enclose a whole program, and end it with the exit status on which launchers start it again.

    That happens at a SIGTERM which nothing else handles, such as one during loading, and in a run
    of several processes when their connection fails (a peer is lost, or late to join).
    """
    previous = signal.signal(signal.SIGTERM, _restart)
    try:
        yield
    except RuntimeError as error:
        of_jax = isinstance(error, jax.errors.JaxRuntimeError)
        between = of_jax or any(code in str(error) for code in ("DEADLINE_EXCEEDED", "UNAVAILABLE"))
        alone = not jax.distributed.is_initialized()
        if alone or not between or "RESOURCE_EXHAUSTED" in str(error):
            raise
        traceback.print_exc()
        raise SystemExit(RESTART) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def _restart(number: int, frame: FrameType | None) -> None:
    raise SystemExit(RESTART)


def config() -> ConfigDict:
    return flags.FLAGS.config


def prepare(workdir: epath.Path, resume: bool) -> None:
    """Make the work directory, before anything that takes long.

    Raises FileExistsError when it holds another run and this is no resume, OSError when nothing can
    be written to it.
    """
    outputs.check_directory(workdir, "--workdir")
    kept, best, good = (
        {step.name for step in (workdir / folder).glob("[0-9]*") if step.name.isdigit()}
        for folder in ("checkpoints", "best", "good")
    )
    if resume:
        return
    if kept or (best | good) - {"0"}:
        raise FileExistsError(
            f"{workdir} already holds a run: add --resume to go on with it, or give another"
            " --workdir"
        )
    for folder, found in {"best": best, "good": good}.items():
        if found and jax.process_index() == 0:  # of a run that saved nothing, at its start
            (workdir / folder).rmtree()


def record(workdir: epath.Path, config: ConfigDict) -> None:
    """Write the resolved config. A resumed run does so once its checkpoint has been read, so that a
    wrong setting does not replace the record of the right one."""
    if jax.process_index() == 0:
        files.replace(workdir / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


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
