"""Files: paths that may lie in a bucket (`gs://...`, through etils and Orbax), text and JSON."""

from __future__ import annotations

import codecs
import hashlib
import json
from pathlib import Path
from typing import Any

from etils import epath


def in_bucket(path: epath.PathLike) -> bool:
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root, links followed. One in a bucket is that already, and `resolve` would
    take it for a path below the current directory."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.resolve()


def replace(file: epath.Path, text: str) -> None:
    """Write a whole file. If the disk is full, the one before it stays."""
    if in_bucket(file):  # nothing appears there before it is complete
        file.write_text(text)
        return
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.replace(file)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises ValueError that names the line, and how to convert the file, where it is in another
    encoding.
    """
    data = path.read_bytes()
    # UTF-16 has its own mark, or, in Latin script, a zero byte in every letter.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ValueError(
            f"{path}: line 1 is not UTF-8 but looks like UTF-16: save the file as UTF-8, for"
            f" example with `iconv -f UTF-16 -t UTF-8 {path}`"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.object[error.start : error.start + 1]
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line} is not UTF-8, for it has a byte 0x{wrong.hex()}: save the file as"
            f" UTF-8; one in Windows' encoding is converted by `iconv -f CP1252 -t UTF-8 {path}`"
        ) from error


def read_json(file: epath.Path | Path) -> Any:
    """Read a JSON file. Raises ValueError that names the file if it is damaged."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged, copy or download it again: {error}") from error


def read_object(file: epath.Path | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that names it where it holds something else."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a JSON {type(found).__name__}, it must hold an object")
    return found


def digest(file: Path, parts: int = 64, length: int = 2**16) -> str:
    """A hash of a file's size and of `parts` pieces of it, or of all of a small one.

    To read all of T5-XXL's 9.5 GB would take longer than to encode the prompts. This tells trained
    weights apart, but may not see that a single row was edited by hand.
    """
    size = file.stat().st_size
    seen = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        if size <= parts * length:
            seen.update(opened.read())
        else:
            for i in range(parts):
                opened.seek(i * (size - length) // (parts - 1))
                seen.update(opened.read(length))
    return seen.hexdigest()
