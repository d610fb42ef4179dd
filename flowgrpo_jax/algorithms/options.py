"""Ranges of an algorithm's options. Each function raises ValueError that names the option."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def positive(**options: float) -> None:
    """Refuse what is not above 0."""
    _check(options, lambda value: value > 0, "must be above 0")


def at_least(least: float, *, meaning: str = "", **options: float) -> None:
    """Refuse what is below the least value, whose meaning is told if it has one of its own."""
    which = f", which means {meaning}" if meaning else ""
    _check(options, lambda value: value >= least, f"must be at least {least:g}{which}")


def at_most(most: float, **options: float) -> None:
    """Refuse what is above the largest value."""
    _check(options, lambda value: value <= most, f"must be at most {most:g}")


def below_one(**options: float) -> None:
    """Refuse what is not in [0, 1): a copy that kept all of itself would never follow the policy,
    and one that kept more would diverge."""
    _check(options, lambda value: 0 <= value < 1, "must be in [0, 1)")


def one_of(known: Iterable[str], **options: str) -> None:
    """Refuse what is not among the known names."""
    _check(options, lambda value: value in known, f"choose from {', '.join(map(repr, known))}")


def _check(options: Mapping[str, Any], holds: Callable[[Any], bool], must: str) -> None:
    for name, value in options.items():
        if not holds(value):  # nor does NaN
            raise ValueError(f"algorithm.options.{name}={value!r}: {must}")
