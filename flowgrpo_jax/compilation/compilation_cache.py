"""A cache that keeps compiled programs between starts.

JAX does the caching. An entry's key covers the program, the versions of JAX and XLA, XLA's flags,
and the devices with what their processors can do, so that different machines can share a cache.
What is added here: a place for it that needs no setting, and files that appear only when they are
complete.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from etils import epath

from flowgrpo_jax.storage import files

log = logging.getLogger(__name__)
AUTOMATIC, OFF = "auto", "off"  # choices of the flag --compilation_cache beside a path
FOLDER = "compiled"  # of the cache in a work directory, and in the user's cache directory
UNUSED = 90 * 24 * 3600  # seconds after which an entry that nobody has read is removed
WHOLE = "whole://"  # prefix of the paths that are `WholeFiles`


def start(where: str, workdir: epath.Path | None = None) -> None:
    """Have JAX keep the programs that it compiles, and read those that it kept earlier.

    To be called before the first compilation. A cache that cannot be used costs a warning.

    Args:
      where: "off", a directory or bucket, or "auto": JAX_COMPILATION_CACHE_DIR if that is set,
        otherwise what `default_place` says. JAX_ENABLE_COMPILATION_CACHE=0 always switches it off.
      workdir: the work directory of a run.
    """
    if where == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    try:
        if where == AUTOMATIC:
            place = jax.config.values["jax_compilation_cache_dir"] or default_place(workdir)
        else:
            place = where
        folder = files.absolute(place)
        _make(folder)
    except Exception as error:  # those of buckets are not OSErrors
        log.warning(
            "compiled programs are not kept: %s. Give a directory or bucket that can be written to"
            " as --compilation_cache, or --compilation_cache=off",
            error,
        )
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if files.in_bucket(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        return
    jax.config.update("jax_compilation_cache_dir", f"{WHOLE}{folder}")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A start has more than a hundred small programs, each read from a disk in no time. In a
        # bucket JAX's own limit of a second stays, for each file there costs a round trip.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def default_place(workdir: epath.Path | None) -> epath.Path | Path:
    """Choose where compiled programs are kept when nobody says it.

    The work directory of a run in a bucket or of several processes holds its own: all hosts of the
    run see it, and it outlives a pod that is preempted. Otherwise they are kept in the user's
    cache directory, as the XDG Base Directory Specification has it.
    """
    if workdir and (files.in_bucket(workdir) or jax.distributed.is_initialized()):
        return workdir / FOLDER
    given = os.environ.get("XDG_CACHE_HOME", "")  # to be ignored when it is relative
    home = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return home / "flowgrpo_jax" / FOLDER


def _make(folder: epath.Path) -> None:
    """Create a cache, for its user alone: whoever can write to it can run code as the user. Remove
    the entries of an existing one that have not been used for long.

    Raises OSError, or what its bucket raises, when it cannot be written to.
    """
    if files.in_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return
    local = Path(folder)
    local.parent.mkdir(parents=True, exist_ok=True)
    local.mkdir(mode=0o700, exist_ok=True)
    if not os.access(local, os.W_OK | os.X_OK):
        raise PermissionError(f"{local} cannot be written to")
    oldest = time.time() - UNUSED
    for file in local.iterdir():
        with suppress(OSError):  # another process may remove it as well
            status = file.stat()
            if file.is_file() and max(status.st_atime, status.st_mtime) < oldest:
                file.unlink()


@epath.register_path_cls(WHOLE)
class WholeFiles:
    """A local path, as JAX's cache uses one, whose files appear when they are complete.

    JAX writes an entry in place. Another process may read a part of it, and after a process that
    is killed while it writes, the part stays for good: JAX replaces no entry.
    """

    def __init__(self, path: str | Path):
        self.path = Path(str(path).removeprefix(WHOLE))

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    def __truediv__(self, name: str) -> WholeFiles:
        return WholeFiles(self.path / name)

    def joinpath(self, *names: str) -> WholeFiles:
        return WholeFiles(self.path.joinpath(*names))

    def write_bytes(self, data: bytes) -> int:
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            part.write_bytes(data)
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)
        return len(data)

    def __getattr__(self, name: str) -> Any:  # exists, mkdir, read_bytes and what else there is
        return getattr(self.path, name)
