"""The status with which a program ends, also while a program or a reward is still at work."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

from flowgrpo_jax.command_line.stop import Stop
from flowgrpo_jax.scoring import host

RESTART = 75  # exit status after SIGTERM: saved, to be started again (sysexits.h: EX_TEMPFAIL)
MEETING = 10.0  # seconds that a process waits at its end for the others of the run


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
