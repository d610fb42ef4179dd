"""Files: paths that may lie in a bucket (`gs://...`, through etils and Orbax), and JSON."""

from __future__ import annotations

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


def read_json(file: epath.Path | Path) -> Any:
    """What a JSON file says. Raises ValueError that names it where it is damaged."""
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
