"""Prompt files: `.txt`, a prompt a line, and `.jsonl`, a record a line. Both are UTF-8.

Every error names the file and the line. `null` and NaN, which Arrow and pandas write for keys that
a record does not have, count as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowgrpo_jax.storage import files
from flowgrpo_jax.types import Metadata


def records(path: Path) -> Iterator[tuple[int, Metadata]]:
    """Yield every record of a file with the number of its line, which counts from 1.

    Raises ValueError for another suffix, for what is not UTF-8 and for what is no record.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompt source {str(path)!r}: the suffix must be .txt or .jsonl")
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        if line.strip():
            yield (
                number,
                parse(path, number, line) if path.suffix == ".jsonl" else {"prompt": line.strip()},
            )


def parse(path: Path, number: int, line: str) -> Metadata:
    """Read the record of one line of a `.jsonl`, without its absent keys.

    Raises ValueError that names the file, the line and the key.
    """
    place = f"{path}: line {number}"
    record = json_object(path, number, line, "prompt")
    record = {"prompt": record["prompt"], **present(record)}
    for key in ("prompt", "tag"):
        value = record.get(key, "")
        try:
            value.encode()
        except (AttributeError, UnicodeEncodeError) as error:  # no text, or half a surrogate pair
            raise ValueError(f'{place}: "{key}" is no text: it is {value!r}') from error
    return record


def json_object(path: Path, number: int, line: str, key: str) -> dict[str, Any]:
    """Read the JSON object of one line, which has to have a key.

    Raises ValueError that names the file and the line.
    """
    place = f"{path}: line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f'{place} is no object with a "{key}"')
    return record


def present(value: Any) -> Any:
    """Leave out every key, at any depth, whose value is null or NaN."""
    if isinstance(value, dict):
        return {k: present(v) for k, v in value.items() if v is not None and v == v}
    return [present(item) for item in value] if isinstance(value, list) else value
