"""The knobs of a recipe, which `--config.section.name=value` sets, and what is said about each."""

from __future__ import annotations

import ast
import inspect
import runpy
from collections.abc import Mapping
from typing import Any

from flowgrpo_jax.command_line import recipe_files
from flowgrpo_jax.configs import base  # its comments explain every knob


def load(recipe: str | None) -> dict[str, Any]:
    """Every knob with its value by dotted name.

    Args:
      recipe: a value of `--config`; None: the base that every recipe starts from.

    Raises FileNotFoundError where there is no such recipe, and what the recipe's code raises.
    """
    if recipe is None:
        return flat(base.get_config().to_dict())
    path, *variant = recipe_files.find(recipe).split(":", 1)
    return flat(runpy.run_path(path)["get_config"](*variant).to_dict())


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
    source = inspect.getsource(base.get_config)
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
