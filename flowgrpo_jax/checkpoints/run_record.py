"""The record beside a checkpoint: which settings and which base model its state belongs to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from flowgrpo_jax.command_line import knobs
from flowgrpo_jax.models import base_model
from flowgrpo_jax.models.base_model import BaseModel

SHAPING = {  # part of a checkpoint: the settings that its arrays and their shapes follow
    "ema": ("model.path", "lora.rank", "lora.targets"),
    "state/copies": ("algorithm.options", "kl.name", "kl.reset_above", "kl.reset_every"),
    "state/memory": (
        "advantage.options",
        "kl.name",
        "kl.options",
        "prompts.train",
        "prompts.tasks",
    ),
}


def shaping(record: dict[str, Any], part: str) -> str:
    """The settings that a part of a checkpoint follows, with their values in its record."""
    config = record.get("config", {})
    paths = (name.split(".") for name in SHAPING[part])
    return ", ".join(
        f"{section}.{key}={config[section][key]!r}"
        for section, key in paths
        if key in config.get(section, {})
    )


def same_settings(
    record: dict[str, Any], config: dict[str, Any], path: Sequence[str], where: epath.Path
) -> None:
    """Raises ValueError when a state was made with another value than the config's of a setting
    that it cannot go on without; the others, rank and targets, show in its shapes."""
    if not (then := record.get("config")):
        return
    now: Any = config
    for part in path:
        then, now = then[part], now[part]
    if then != now:
        name = ".".join(path)
        raise ValueError(
            f"{where} was trained with {name}={then}, and the config has {name}={now}: set"
            f" --config.{name}={then}"
        )


def changed_settings(record: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The settings that have another value in the config than in a record, each as "NAME: THEN ->
    NOW". Settings that only one of them has, because another version wrote it, are left out."""
    then = knobs.flat(record.get("config", {}))
    now = knobs.flat(json.loads(json.dumps(config)))  # as a record keeps it: tuples are lists
    shared = [name for name in then if name in now]
    return [f"{name}: {then[name]} -> {now[name]}" for name in shared if then[name] != now[name]]


def base_of(record: dict[str, Any]) -> BaseModel:
    """The base model that a checkpoint's record names; older records lack its mark."""
    name = record.get("config", {}).get("model", {}).get("path", "")
    return BaseModel(name, record.get("base", ""))


def same_base(record: dict[str, Any], base: BaseModel, where: epath.Path) -> None:
    """Raises ValueError when a run was trained from another base model than the config's."""
    then = base_of(record)
    if not base_model.is_another(then, base):
        return
    if then.name == base.name:
        raise ValueError(
            f"{where} was trained from the base model {then.name}, whose weights have changed"
            " since: put the former ones in its place, or start a new run"
        )
    raise ValueError(
        f"{where} was trained from the base model {then.name}, and the config has"
        f" model.path={base.name}, which has other weights: set --config.model.path={then.name}, or"
        " start a new run"
    )
