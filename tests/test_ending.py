"""How a process ends: with the status that it means to end with, whatever is still at work."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AT_WORK = """
import signal, sys, threading
import jax, jax.numpy as jnp
from flowgrpo_jax.command_line import exit_status

@jax.jit
def long(x):  # hours, if nobody ends it
    return jax.lax.fori_loop(0, 10**7, lambda i, y: jnp.tanh(y @ y), x)

with exit_status.ending():
    result = long(jnp.ones((300, 300)))
    waiting = threading.Event()

    def wait():
        waiting.set()
        result.block_until_ready()

    threading.Thread(target=wait, daemon=True).start()
    waiting.wait()
    print("saved")
    {end}
"""

# The signal comes once more, from the launcher, while the process ends.
ECHO = """
    flush = sys.stdout.flush
    sys.stdout.flush = lambda: (flush(), signal.raise_signal({number}))
    raise SystemExit(0)
"""


@pytest.mark.parametrize(
    "end, status",
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit(exit_status.RESTART)", 75),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        (ECHO.format(number="signal.SIGINT"), 0),
        (ECHO.format(number="signal.SIGTERM"), 0),
    ],
)
def test_a_stop_has_its_status_though_a_program_is_running(end, status):
    """Python's own shutdown would wait for the program, or die of SIGABRT or SIGSEGV."""
    done = subprocess.run(
        [sys.executable, "-c", AT_WORK.format(end=end)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stderr
    assert done.stdout == "saved\n"
    assert ("interrupted" in done.stderr) == (status == -signal.SIGINT)


def test_a_message_for_the_user_is_still_printed():
    program = "with exit_status.ending():\n    raise SystemExit('no file')"
    program = f"from flowgrpo_jax.command_line import exit_status\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (1, "no file\n")
