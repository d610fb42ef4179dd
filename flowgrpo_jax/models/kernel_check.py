"""How far an attention kernel is from the plain one in float32, on the device at hand.

A fused kernel that a driver or a compiler breaks would train on without an error: the rollout and
the update use the same one, so that their ratio stays 1. `check` compares it before a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.models.streams import Kernel, Stream

TOKENS = (1100, 77)  # of the streams that a check compares: whole blocks, and parts of one
HEADS, CHANNELS = 4, 64
TOLERANCE = 0.03  # of the norm. Rounding to bfloat16 gives 0.005 for values, 0.011 for gradients.


@lru_cache(maxsize=16)
def check(name: str, kernel: Kernel, plain: Kernel, device: Any, dtype: Any) -> None:
    """Raise RuntimeError for a kernel whose values or gradients on a device are wrong.

    It is tried with the heads of SD3.5, of 64 channels.
    """
    with jax.default_device(device):
        value, gradient = distances(kernel, plain, streams(TOKENS, HEADS, CHANNELS), HEADS, dtype)
    if not (value < TOLERANCE and gradient < TOLERANCE):  # also for what is not a number
        raise RuntimeError(
            f"model.attention={name!r} is wrong on {device.device_kind!r} with jax"
            f" {jax.__version__}: of random tokens its values are {value:.1%} away from those of"
            f" the plain attention, and its gradients {gradient:.1%} ({TOLERANCE:.0%} is allowed);"
            " set model.attention=xla, and report it"
        )


def streams(tokens: Sequence[int], heads: int, channels: int, images: int = 2) -> list[Stream]:
    """Return random streams of so many tokens each, with norms, in float32."""
    found = []
    for i, length in enumerate(tokens):
        keys = jax.random.split(jax.random.key(i), 5)
        parts = (jax.random.normal(key, (images, length, heads * channels)) for key in keys[:3])
        scales = (1 + jax.random.normal(key, (channels,)) / 4 for key in keys[3:])
        found.append(Stream(*parts, *scales))
    return found


def distances(
    kernel: Kernel, plain: Kernel, exact: Sequence[Stream], heads: int, dtype: Any
) -> tuple[float, float]:
    """Return the relative distances of a kernel's values and of its gradients in `dtype`.

    Each is the largest over all streams, and NaN where one of them is. They are compared with those
    of `plain` in float32.
    """
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(run, static_argnums=(0, 2))(plain, exact, heads)
    rounded = jax.tree.map(lambda x: x.astype(dtype), exact)
    found = jax.jit(run, static_argnums=(0, 2))(kernel, rounded, heads)
    value, gradient = (
        float(np.max(jax.tree.leaves(jax.tree.map(_distance, *pair))))
        for pair in zip(found, wanted)
    )
    return value, gradient


def run(kernel: Kernel, given: Sequence[Stream], heads: int) -> tuple[list[jax.Array], Any]:
    """Return the values of a kernel, and the gradient of half of the sum of their squares."""
    values, back = jax.vjp(lambda given: kernel(given, heads), given)
    return values, back(values)[0]


def _distance(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
