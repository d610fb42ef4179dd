"""A user's mistake ends a command with one line; every other error shows where it happened."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

TRACEBACK = "FLOWGRPO_TRACEBACK"  # environment variable that shows every error's traceback
CHECKED = ("flowgrpo_jax", "config_config", "__main__")  # packages; a config file's name


@contextmanager
def in_one_line() -> Iterator[None]:
    """Enclose a whole program, print a user's mistake as one line and exit with status 1.

    Other errors, and all of them where the environment has FLOWGRPO_TRACEBACK, go on to Python,
    which prints the traceback.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get(TRACEBACK) or not is_for_users(error):
            raise
        print("error:", message(error), file=sys.stderr)
        raise SystemExit(1) from None


def is_for_users(error: Exception) -> bool:
    """Return whether the message alone tells a user what to do.

    That holds for what a check of this package or of a recipe raised, that is, for an error that
    comes from a `raise` in their own code and not from something that they called; and for what the
    operating system says about a file that it names.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return True
    last = _origin(error.__traceback__)
    if last is None:
        return False
    frame = last.tb_frame
    ours = frame.f_globals.get("__name__", "").partition(".")[0] in CHECKED
    return ours and frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _origin(trace: TracebackType | None) -> TracebackType | None:
    """The entry of a traceback in which the error was raised."""
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace


def message(error: BaseException) -> str:
    """An error's message with its notes, in one line."""
    parts = [str(error) or type(error).__name__, *getattr(error, "__notes__", ())]
    return " ".join(" ".join(parts).split())
