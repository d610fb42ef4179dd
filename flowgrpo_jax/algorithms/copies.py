"""Copies of the policy: how much of itself a copy keeps at the end of an epoch.

Each function returns decay(begun, step), of the optimiser steps taken before the epoch and after
it, as `Algorithm.copies` takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Decay = Callable[[jax.Array, jax.Array], Any]


def rising(rate: float, most: float, *, flat: int = 0, first: float = 0.0) -> Decay:
    """Keep min(first + rate x max(step - flat, 0), most)."""

    def decay(begun: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.minimum(first + jnp.maximum(step - flat, 0) * rate, most)

    return decay


def fresh(begun: jax.Array, step: jax.Array) -> float:
    """Keep nothing: the copy is the policy as the epoch found it, which drew the images."""
    return 0.0


def reset(every: int) -> Decay:
    """Keep all until `every` further optimiser steps have been taken, and then nothing."""

    def decay(begun: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.where(step // every > begun // every, 0.0, 1.0)

    return decay
