"""How tests compile: quickly, and into one directory that the processes they start share."""

import atexit
import hashlib
import os
import platform
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

SECONDS_KEPT = 30 * 24 * 3600
FLAGS = "XLA_FLAGS"
DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
# LLVM's optimisations take longer than they save: the models of tests are small.
QUICKLY = "--xla_backend_optimization_level=0"
KEEP_ALL = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def switch_on(env=os.environ):
    """Name the directory and the level of optimisation in the environment. JAX reads it there when
    it is imported.

    A directory or a level that the environment names already is kept.
    """
    if QUICKLY.partition("=")[0] not in env.get(FLAGS, ""):
        env[FLAGS] = f"{env.get(FLAGS, '')} {QUICKLY}".strip()
    for name, value in KEEP_ALL.items():
        env.setdefault(name, value)
    if DIRECTORY not in env:
        env[DIRECTORY] = str(directory(env))


def keep_of_every_process():
    """Have this process keep what it compiles, whichever of a run's processes it is.

    JAX keeps what process 0 compiles. On a CPU the other processes never find that, as programs
    are kept under the numbers of their devices, and so they would compile all of it in each run.
    """
    from jax._src import compilation_cache, compiler

    def write(key, seconds, module, backend, executable, host_callbacks=()):
        if not host_callbacks:
            compilation_cache.put_executable_and_time(
                key, module, executable, backend, int(seconds)
            )

    compiler._cache_write = write


def directory(env):
    """A directory of the user's cache, or a temporary one where nothing can be written there."""
    root = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowgrpo_jax" / "tests"
    chosen = root / f"jax-{version('jax')}-{processor()}"
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=chosen).close()
    except OSError:
        temporary = tempfile.mkdtemp(prefix="flowgrpo-tests-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)
    remove_old(root)
    return chosen


def processor():
    """A short name of the processor's kind. Programs are compiled for its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    text = "\n".join(sorted(kinds)) or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def remove_old(root, now=None):
    """Delete what was compiled more than SECONDS_KEPT ago, also by other versions of JAX."""
    oldest = (now or time.time()) - SECONDS_KEPT
    for file in root.rglob("*-cache"):
        try:
            if file.stat().st_mtime < oldest:
                file.unlink()
        except FileNotFoundError:  # another process deletes as well
            continue
