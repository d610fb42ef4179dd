"""Tables of rows: a name stands for an object that is imported when it is asked for.

A row is the string "package.module:attribute". Wherever a config takes the name of a row it also
takes such a string, so that an algorithm, an advantage, a kernel or a reward of the user's own, in
a file of the folder that the command is started in, needs no change inside this package.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def find(table: Mapping[str, str], name: str, kind: str) -> Any:
    """Return the object of a row.

    Args:
      table: name -> "package.module:attribute".
      name: a name of the table, or such a string of the user's own.
      kind: what the rows are, for the errors: "algorithm".

    Raises ValueError that names the rows when there is no such row, module or attribute.
    """
    own = name not in table
    module, _, attribute = table.get(name, name).partition(":")
    if not attribute:
        raise ValueError(
            f"{kind} {name!r} is unknown: choose from {', '.join(sorted(table))}, or give one of"
            " your own as 'package.module:name'"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if not own:
            raise
        raise ValueError(
            f"{kind} {name!r} cannot be imported: {error}. Start the command in the folder that"
            f" holds {module.partition('.')[0]}, or add that folder to PYTHONPATH"
        ) from error


def make(factory: Callable[..., Any], options: Mapping[str, Any], what: str, **given: Any) -> Any:
    """Call a factory with options.

    Args:
      what: the setting that the options come from, for the errors: "algorithm.options".
      given: further arguments, which are not for the user to set.

    Raises ValueError for an option that is unknown, and names those that there are, and for a value
    of another type than the option's default.
    """
    if not callable(factory):
        raise ValueError(f"{what}: {factory!r} is no function: name one, as 'package.module:make'")
    known = {k: p for k, p in inspect.signature(factory).parameters.items() if k not in given}
    if unknown := sorted(set(options) - set(known)):
        takes = ", ".join(
            name if p.default is p.empty else f"{name}={p.default!r}" for name, p in known.items()
        )
        raise ValueError(
            f"{what}: {', '.join(unknown)} is unknown; {factory.__module__} takes"
            f" {takes or 'no options'}"
        )
    for name, value in options.items():
        if not _is_like(value, known[name].default):
            raise ValueError(
                f"{what}: {name}={value!r} must be of the type of its default,"
                f" {known[name].default!r}"
            )
    return factory(**given, **options)


def check(value: Any, kind: type, name: str) -> Any:
    """Return the value. Raises ValueError where a row of the user's own is of another kind.

    Args:
      name: what the recipe calls it, for the error.
    """
    if not isinstance(value, kind):
        raise ValueError(
            f"{name!r} gives a {type(value).__name__}, it must be a"
            f" {kind.__module__}.{kind.__name__}"
        )
    return value


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value has the type of a default; whole numbers are good where it is a float."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, float | int)
    return not isinstance(default, int | str) or isinstance(value, type(default))
