"""Stand-ins for the programs that the launchers call on clusters, and waiting for what they do."""

import os
import subprocess
import time
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch"


def command(folder, name, script):
    """Put an executable of this name in front of the path."""
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(0o755)


def environment(folder, **more):
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PAUSE": "0.05", **more}


def call(folder, script, *arguments, **more):
    return subprocess.run(
        [LAUNCH / script, *arguments],
        cwd=folder,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=60,
    )


def calls(folder):
    return (folder / "calls").read_text().splitlines()


def wait_for(file):
    wait_until(file.exists)


def wait_until(true):
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
