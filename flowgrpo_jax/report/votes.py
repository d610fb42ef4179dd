"""Votes between the pictures of a prompt, as files: NAME.json and NAME.webp are a sheet of pictures
that waits for a vote, and NAME.answer.json is the vote. NAME is a hash of the pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from etils import epath

from flowgrpo_jax.storage import files

ANSWER = ".answer.json"


def answer(folder: epath.Path, name: str) -> epath.Path:
    """The file of a group's vote."""
    return folder / f"{name}{ANSWER}"


def give(folder: epath.Path, name: str, chosen: Sequence[int] | None) -> None:
    """Record the pictures that were chosen, by their place; None: nobody voted in time."""
    said = {"chosen": None if chosen is None else sorted(set(chosen)), "given": time.time()}
    files.replace(answer(folder, name), json.dumps(said))


def given(folder: epath.Path, name: str) -> list[int] | None:
    """Return the pictures that were chosen; None where nobody voted in time."""
    return files.read_object(answer(folder, name))["chosen"]


def waiting(folder: epath.Path) -> list[str]:
    """The names of the groups that wait for a vote, the oldest first."""
    names = {f.name for f in folder.glob("*.json")} if folder.exists() else set()
    asked = [n.removesuffix(".json") for n in names if not n.endswith(ANSWER)]
    open_ = [n for n in asked if f"{n}{ANSWER}" not in names]
    return sorted(open_, key=lambda n: files.read_object(folder / f"{n}.json")["asked"])
