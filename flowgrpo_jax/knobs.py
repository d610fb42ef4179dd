"""The knobs of a recipe, which `--config.section.name=value` sets, and what is said about each."""

from __future__ import annotations

import ast
import importlib
import inspect
import runpy
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

BASE = "flowgrpo_jax.configs.base"  # its comments explain every knob


def recipe_file(arguments: Sequence[str]) -> str | None:
    """The value of `--config` on a command line, if it is given."""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return None


def base() -> ModuleType | None:
    """The module that every recipe starts from; None where Python does not find it."""
    try:
        return importlib.import_module(BASE)
    except ImportError:
        return None


def load(file: str | None) -> dict[str, Any]:
    """Every knob with its value by dotted name, of the recipe in a file or of the base of all.

    Empty where neither is there. Raises what the recipe's code raises.
    """
    if file:
        path, *variant = file.split(":", 1)
        return flat(runpy.run_path(path)["get_config"](*variant).to_dict())
    module = base()
    return flat(module.get_config().to_dict()) if module else {}


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested dict by dotted name; an empty dict is a value."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def comments() -> dict[str, str]:
    """Return what the base says about each knob and section, by dotted name.

    The comment of a knob stands in whole lines directly above it.
    """
    if (module := base()) is None:
        return {}
    source = inspect.getsource(module.get_config)
    lines = source.splitlines()
    said: dict[str, str] = {}
    for statement in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [t for x in targets for t in (x.elts if isinstance(x, ast.Tuple) else [x])]
        above: list[str] = []
        for line in reversed(lines[: statement.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip().lstrip("# "))
        for target in targets:
            if above:
                said[ast.unparse(target).partition(".")[2]] = " ".join(above)
    return said
