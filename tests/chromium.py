"""Headless Chromium, where Debian's package `chromium` is installed."""

import shutil
import subprocess
import tempfile

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=3000",
)


def call(address, *flags):
    """Open a page in a browser of its own. Returns what the flags ask for on standard output."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [PROGRAM, *FLAGS, f"--user-data-dir={profile}", *flags, str(address)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return done.stdout
