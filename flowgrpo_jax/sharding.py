"""Where arrays live. The only file that names a mesh axis."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

ROWS = PartitionSpec("data")  # the batch axis, cut over all devices


def make_mesh(devices: int | None = None) -> Mesh:
    """The first `devices` devices (all without it) on one `data` axis.

    Auto axes: the compiler chooses inner layouts.
    """
    chosen = jax.devices()[:devices]
    return jax.make_mesh((len(chosen),), ("data",), axis_types=(AxisType.Auto,), devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of every array on every device."""
    return jax.device_put(tree, replicated(mesh))


def split_rows(mesh: Mesh, tree: Any) -> Any:
    """Arrays [M, ...] cut along their first axis."""
    return jax.device_put(tree, NamedSharding(mesh, ROWS))


def constrain_rows(mesh: Mesh, x: jax.Array) -> jax.Array:
    """Inside jit: keep the first axis cut over the devices."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ROWS))
