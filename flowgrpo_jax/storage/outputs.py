"""Checks of the place that a command writes to, so that an error comes before the work, not after.

Every function takes the flag that names the place, for the error.
"""

from __future__ import annotations

import io
import uuid
from contextlib import suppress
from pathlib import Path

from etils import epath
from PIL import Image


def check_directory(directory: epath.PathLike, flag: str) -> None:
    """Make a directory, on a disk or in a bucket, and write a file there for a moment.

    Raises OSError where that fails.
    """
    directory = epath.Path(directory)
    probe = directory / f".probe-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("to be removed")
        probe.unlink()
    except Exception as error:  # those of buckets are not OSErrors
        with suppress(Exception):
            probe.unlink(missing_ok=True)
        raise OSError(
            f"nothing can be written to {directory}: {error}. Give another {flag}, or see to it"
            " that the disk or bucket exists, has room and lets you write"
        ) from error


def check_file(file: epath.PathLike, flag: str) -> None:
    """Make the directory of a file, and write there for a moment; the file is left alone.

    Raises OSError where that fails, IsADirectoryError where the file is a directory.
    """
    file = epath.Path(file)
    if file.is_dir():
        raise IsADirectoryError(f"{flag}={file} is a directory: name a file, such as {file}/out")
    check_directory(file.parent, flag)


def check_picture(file: Path, flag: str) -> None:
    """Do as `check_file`, and save a small picture of that format in memory.

    Raises ValueError for a suffix that names no format of pictures.
    """
    check_file(file, flag)
    try:
        form = Image.registered_extensions()[file.suffix.lower()]
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format=form)
    except (KeyError, OSError) as error:  # no format, or one that is only read
        raise ValueError(
            f"{flag}={file}: the suffix {file.suffix!r} names no format that a picture can be saved"
            f" in; use .png, as in {file.stem}.png"
        ) from error
