"""The base model that a policy was trained from: its name, and a mark of its transformer's weights.

Models may have equal shapes and other weights, so that a policy of one fits the other without an
error: all 382 default LoRA factors of SD3-medium have the shapes of SD3.5-medium's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from flowgrpo_jax.models import Model, directories
from flowgrpo_jax.models.weight_files import component_files
from flowgrpo_jax.storage.files import digest


class BaseModel(NamedTuple):
    """A model by its name (a directory, a hub id or one of the package) and by its mark.

    Either is "" where it is not known.
    """

    name: str = ""
    mark: str = ""


def mark(directory: Path) -> str:
    """A hash of the transformer's config and of pieces of its weights.

    It is the same wherever the directory lies, and different for other weights. Raises
    FileNotFoundError where the transformer is missing.
    """
    folder = directory / "transformer"
    parts = [digest(file) for file in (folder / "config.json", *component_files(folder))]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def of(model: Model) -> BaseModel:
    """A loaded model as the base of what is trained. Raises ValueError for one without weights."""
    if not model.name:
        raise ValueError("this model is only described: `load` it to train it")
    return BaseModel(model.name, mark(model.directory))


def is_another(then: BaseModel, now: BaseModel) -> bool:
    """Whether a policy was trained from another model than the one it is used with.

    The marks decide. Where there is none of `then` it is made from the model of that name if it is
    on this machine. Otherwise the last parts of the names decide, as of a hub id and its copy.
    Nothing is known to differ of a model without a name.
    """
    known = then.mark or _mark_of(then.name)
    if known and now.mark:
        return known != now.mark
    return bool(then.name and now.name) and _last_part(then.name) != _last_part(now.name)


def _mark_of(name: str) -> str:
    """The mark of the model of this name, or "" where it is not on this machine."""
    directory = directories.on_this_machine(_without_folder(name)) if name else None
    try:
        return mark(directory) if directory else ""
    except (FileNotFoundError, ValueError):
        return ""


def _without_folder(name: str) -> str:
    """The name of the whole model: PEFT notes the folder of its transformer."""
    return name.rstrip("/").removesuffix("/transformer")


def _last_part(name: str) -> str:
    return _without_folder(name).rpartition("/")[2]
