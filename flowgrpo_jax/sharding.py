"""The mesh, and strict rules from parameter paths to the layouts of arrays on it.

Three axes. `data` and `fsdp` both cut the batch; `fsdp` also cuts the frozen weights, each device
keeping a part and fetching a block's rest when the block runs; `tensor` cuts the linears Megatron's
way, outputs first, inputs after (arXiv:1909.08053). Results do not depend on the layout but for
rounding. The only file that names a mesh axis; everything runs under plain `jit`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # the batch axis
LEAVES = ("lora_a", "lora_b", "kernel", "bias", "scale", "embedding")  # ends of parameters' paths

# A model's table of rules: which layout each of its parameters has. Exactly one pattern must match
# the end of a parameter's path. The layout is that of one layer; a stack has its own first axis
# before it, which is never cut.
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]


def cut_outputs(names: str) -> Rules:
    """Return the rules of linears whose outputs are cut, so that each device has whole heads or
    hidden units. `names` is a pattern; adapters are cut like the linear that they belong to."""
    return (
        (rf"({names})/kernel(_scale)?", ("fsdp", "tensor")),
        (rf"({names})/bias", ("tensor",)),
        (rf"({names})/lora_a", ("fsdp", None)),
        (rf"({names})/lora_b", (None, "tensor")),
    )


def cut_inputs(names: str) -> Rules:
    """Return the rules of linears whose inputs are cut, and whose outputs the devices sum up."""
    return (
        (rf"({names})/kernel(_scale)?", ("tensor", "fsdp")),
        (rf"({names})/bias", (None,)),
        (rf"({names})/lora_a", ("tensor", None)),
        (rf"({names})/lora_b", (None, "fsdp")),
    )


def cut_storage(names: str) -> Rules:
    """Return the rules of linears that are cut for storage alone, and run whole."""
    return (
        (rf"({names})/kernel(_scale)?", ("fsdp", None)),
        (rf"({names})/bias", (None,)),
        (rf"({names})/lora_a", ("fsdp", None)),
        (rf"({names})/lora_b", (None, None)),
    )


def cut_table(names: str) -> Rules:
    """Return the rule of embedding tables that are cut for storage."""
    return ((rf"({names})/embedding", ("fsdp", None)),)


def whole(pattern: str, ndim: int) -> Rules:
    """Return the rule of parameters of `ndim` axes that every device has in full."""
    return ((pattern, (None,) * ndim),)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make a mesh data x fsdp x tensor of all devices or `devices`; one size may be -1, the rest.

    Auto axes: the compiler chooses inner layouts. Raises ValueError when the sizes do not fit.
    """
    chosen = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor)))
    known = math.prod(n for n in sizes.values() if n != -1)
    open_axes = [axis for axis, n in sizes.items() if n == -1]
    for axis in open_axes:
        sizes[axis] = len(chosen) // max(known, 1)
    if len(open_axes) > 1 or min(sizes.values()) < 1 or math.prod(sizes.values()) != len(chosen):
        raise ValueError(
            f"mesh {dict(zip(AXES, (data, fsdp, tensor)))} does not fit {len(chosen)} devices: the"
            " product must be their number; at most one size may be -1, which means the rest"
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=axis_types, devices=chosen)


def row_shards(mesh: Mesh) -> int:
    """Return the number of parts into which the batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def weight_shards(mesh: Mesh) -> int:
    """Return the number of parts into which the frozen weights are cut."""
    return mesh.shape["fsdp"]


def head_shards(mesh: Mesh) -> int:
    """Return the number of parts into which a linear's work and attention's heads are cut."""
    return mesh.shape["tensor"]


# ------------------------------------------------------------------------------- parameters


def spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """The layout of the parameter at `path`. An axis that does not divide its dimension is not cut.

    Raises ValueError unless exactly one rule matches.
    """
    matching = [cut for pattern, cut in rules if re.search(rf"(^|/)({pattern})$", path)]
    if len(matching) != 1:
        raise ValueError(
            f"parameter {path!r} meets {len(matching)} sharding rules of its model, it must be"
            " exactly one: add or correct a row of the model's `rules`"
        )
    (cut,) = matching
    stack = (None,) * (len(shape) - len(cut))
    if len(stack) != (":" in path):
        raise ValueError(
            f"parameter {path!r} of shape {shape} does not fit its rule {cut}: give the rule one"
            " entry for each axis of one layer"
        )
    axes = (*stack, *cut)
    return PartitionSpec(
        *(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape))
    )


def place(mesh: Mesh, rules: Rules) -> Any:
    """(component/path, shape) -> sharding, for loading. The autoencoder is on every device."""

    def of(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if path.startswith("vae/"):
            return replicated(mesh)
        return NamedSharding(mesh, spec(path, leaf.shape, mesh, rules))

    return of


@lru_cache(maxsize=16)  # one function a mesh, by which models and their programs are cached
def gather_weights(mesh: Mesh, rules: Rules) -> Callable[[str, jax.Array], jax.Array] | None:
    """Return the function that all-gathers a block's weights over `fsdp` before the block runs.

    The result is None if `fsdp` cuts nothing. The all-gather is explicit because the compiler alone
    would move the activations between the devices instead, a hundred times as much data.
    """
    if weight_shards(mesh) == 1:
        return None

    def gathered(path: str, x: jax.Array) -> jax.Array:
        cut = (None if axis == "fsdp" else axis for axis in spec(path, x.shape, mesh, rules))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*cut)))

    return gathered


def state_shardings(mesh: Mesh, tree: Any, rules: Rules) -> Any:
    """Return the shardings of a training state: trained weights and optimiser state, by the rules.

    A leaf belongs to a parameter when the last dictionary key on its way is a parameter's path.
    """

    def of(path: tuple[Any, ...], x: Any) -> NamedSharding:
        keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        known = bool(keys) and keys[-1].rpartition("/")[2] in LEAVES
        return NamedSharding(
            mesh, spec(keys[-1], x.shape, mesh, rules) if known else PartitionSpec()
        )

    return jax.tree_util.tree_map_with_path(of, tree)


def put_state(mesh: Mesh, tree: Any, rules: Rules) -> Any:
    """Put a training state onto the devices."""
    return jax.tree.map(_put, tree, state_shardings(mesh, tree, rules))


# --------------------------------------------------------------------------------- batches


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copy every array to every device. Host arrays must be the same in every process."""
    return jax.tree.map(lambda x: _put(x, replicated(mesh)), tree)


def split_rows(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Cut arrays [M, ...] along their first axis, or along another one, over the devices. Host
    arrays are whole, in every process."""

    def put(x: Any) -> jax.Array:
        spec = PartitionSpec(*(None,) * (axis % x.ndim), *ROWS)
        return _put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """Call device_put, also from a process-local array onto a mesh of several processes."""
    local = isinstance(x, jax.Array) and x.is_fully_addressable
    if local and not sharding.is_fully_addressable:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = _put(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        x = np.asarray(x)
    if isinstance(x, np.ndarray) and not sharding.is_fully_addressable:
        # device_put would compare it between all processes, by a copy from each on every device.
        whole = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: whole[index])
    return jax.device_put(x, sharding)


def constrain_rows(mesh: Mesh, x: jax.Array) -> jax.Array:
    """Inside jit: keep the first axis cut over the devices."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ROWS))


def own_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(rows i64 [m], values [m, ...]): what this process holds of an array cut along its first
    axis, each row in one process only."""
    parts = {}
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            parts[shard.index[0].indices(x.shape[0])[0]] = shard.data
    starts = sorted(parts)
    rows = [np.arange(start, start + parts[start].shape[0]) for start in starts]
    if not starts:
        return np.zeros(0, int), np.zeros((0, *x.shape[1:]), x.dtype)
    return np.concatenate(rows), np.concatenate([np.asarray(parts[start]) for start in starts])


def allgather(x: np.ndarray) -> np.ndarray:
    """Return the arrays of all processes, which have the same shape, as [processes, ...]. Every
    process waits here for the others."""
    if jax.process_count() == 1:
        return x[None]
    return np.asarray(multihost_utils.process_allgather(x))


def begin_allgather(mesh: Mesh, tree: Any) -> Any:
    """Begin to copy arrays to every process; `to_host` of the results then waits for no program
    that is dispatched later."""

    def begin(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable
        return x if here else _copy_to_all_devices(mesh)(x)

    return jax.tree.map(begin, tree)


@lru_cache(maxsize=16)
def _copy_to_all_devices(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def from_first_process(numbers: list[int]) -> list[int]:
    """Return the numbers of the first process in every process, which all wait here for it."""
    length = int(allgather(np.array(len(numbers)))[0])
    same_length = (numbers + [0] * length)[:length]
    return allgather(np.array(same_length, int))[0].tolist() if length else []


def to_host(x: Any) -> np.ndarray:
    """Fetch an array, which may be spread over processes, to the host of every process."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
