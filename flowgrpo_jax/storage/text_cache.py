"""Encoded prompts kept on disk: what the text encoders said once need not be computed again.

One safetensors file a prompt, named by a hash of all that its states depend on. At SD3.5's sizes a
file holds 205 x 4096 + 2048 numbers, 1.7 MB in bfloat16.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from flowgrpo_jax.storage import files
from flowgrpo_jax.types import Conditioning

log = logging.getLogger(__name__)


def fingerprint(directory: Path, read: Sequence[Path], **settings: object) -> str:
    """Return a hash of the text settings and the files, on which the states of a prompt depend.

    It is the same on every machine that has the same files, wherever their directory lies.

    Args:
      read: the files below the directory that the model reads to encode text.
    """
    seen = [(f.relative_to(directory).as_posix(), files.digest(f)) for f in read]
    return hashlib.sha256(repr((seen, sorted(settings.items()))).encode()).hexdigest()


def encode_cached(
    encode: Callable[[list[str]], Conditioning],
    texts: Sequence[str],
    directory: str | Path,
    fingerprint: str,
    *,
    strict: bool = False,
    allgather: Callable[[np.ndarray], np.ndarray] = lambda x: x[None],
    to_host: Callable[[jax.Array], np.ndarray] = np.asarray,
) -> Conditioning:
    """`encode(texts)` through the files in `directory`, which is made when it is not there.

    When something is missing, `encode` gets a list as long as `texts`, filled up with repetitions:
    a jitted encoder then sees one shape. A file that cannot be read is written again; one that
    cannot be written (a full disk, another's directory) is a warning. Several processes may share
    the directory.

    Args:
      texts: P prompts. Returns their Conditioning, in order, in the dtype that `encode` gave.
      fingerprint: of the encoders and their settings; another one is another cache.
      strict: raise the error that prevents a prompt from being written, for callers that fill the
        cache.
      allgather: gathers an array of every process, [processes, ...]. Every process encodes what any
        of them lacks, since the encoders may be spread over all of them.
      to_host: fetches an array that may be spread over processes.
    """
    folder = Path(directory).expanduser()
    unwritten: list[Exception] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        unwritten.append(error)
    names = {t: hashlib.sha256(f"{fingerprint}\n{t}".encode()).hexdigest() for t in texts}
    found = {t: states for t, name in names.items() if (states := _read(folder / f"{name}.st"))}
    lacking = np.any(allgather(np.array([t not in found for t in names])), axis=0).tolist()
    if missing := [t for t, lacks in zip(names, lacking) if lacks]:
        filled = missing + missing[-1:] * (len(texts) - len(missing))
        fresh = jax.tree.map(to_host, encode(filled))
        for i, text in enumerate(missing):
            found[text] = {name: states[i] for name, states in fresh.items()}
            try:
                _write(folder / f"{names[text]}.st", found[text])
            except (OSError, SafetensorError) as error:
                unwritten.append(error)
    if unwritten and strict:
        raise unwritten[0]
    if unwritten:
        log.warning("%s keeps not all prompts, which are encoded again: %s", folder, unwritten[0])
    rows = [found[t] for t in texts]
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


def _read(file: Path) -> dict[str, np.ndarray] | None:
    """A prompt's states, or None when there are none that can be read."""
    try:
        return {name: np.asarray(x) for name, x in load_file(file).items()}
    except (OSError, SafetensorError):
        return None


def _write(file: Path, states: dict[str, np.ndarray]) -> None:
    """Write a file in one step, through another name, because others may be reading it."""
    partial = file.with_suffix(f".{socket.gethostname()}-{os.getpid()}")
    try:
        save_file({name: jax.numpy.asarray(x) for name, x in states.items()}, partial)
        partial.replace(file)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
