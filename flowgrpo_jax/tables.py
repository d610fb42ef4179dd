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


def make(factory: Callable[..., Any], options: Mapping[str, Any], what: str) -> Any:
    """Call a factory with options. Raises ValueError that names its options for an unknown one.

    Args:
      what: the setting that the options come from, for the error: "algorithm.options".
    """
    known = inspect.signature(factory).parameters
    if unknown := sorted(set(options) - set(known)):
        takes = ", ".join(f"{p.name}={p.default!r}" for p in known.values()) or "no options"
        names = ", ".join(unknown)
        raise ValueError(f"{what}: {names} is unknown; {factory.__module__} takes {takes}")
    return factory(**options)
