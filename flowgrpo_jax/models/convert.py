"""Checkpoints in diffusers layout, in and out, without torch.

A parameter's path tells where it comes from (`layers.py` says how paths are formed), so the table
of names is derived from the abstract model and cannot miss a row: whatever is missing, left over or
misshapen is one error that lists it all.

Tensors are read one by one and put on the device in their final dtype; a stacked parameter is
allocated there once and filled layer by layer. Host memory holds one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from flowgrpo_jax.models import quantised
from flowgrpo_jax.models.layers import PATCHES, Params
from flowgrpo_jax.models.weight_files import Tensor, Tensors, component_files, from_safetensors

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
Place = Callable[[str, jax.ShapeDtypeStruct], Any]  # path, shape -> sharding or device


def torch_names(path: str) -> list[str]:
    """The checkpoint's names of a parameter: one, or one per layer of a stack `a:b`."""
    parts = path.split("/")
    parts[-1] = LEAVES.get(parts[-1], parts[-1])
    names = [""]
    for part in parts:
        start, colon, end = part.partition(":")
        steps = [str(i) for i in range(int(start), int(end))] if colon else [part]
        names = [f"{head}.{step}" if head else step for head in names for step in steps]
    return names


def _is_stack(path: str) -> bool:
    return ":" in path


def _torch_shape(path: str, layer: tuple[int, ...], patch: int | None) -> tuple[int, ...]:
    """The shape in the checkpoint of one layer's parameter of shape `layer`."""
    if not path.endswith("kernel"):
        return layer
    if len(layer) == 4:  # HWIO -> OIHW
        return (layer[3], layer[2], layer[0], layer[1])
    if patch:
        return (layer[1], layer[0] // patch**2, patch, patch)
    return layer[::-1]


def _from_torch(path: str, x: np.ndarray) -> np.ndarray:
    if not path.endswith("kernel"):
        return x
    if x.ndim == 4 and path == PATCHES:
        return x.reshape(x.shape[0], -1).T
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _to_torch(path: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if not path.endswith("kernel"):
        return x
    if x.ndim == 4:
        return x.transpose(3, 2, 0, 1)
    return x.T.reshape(shape)


def _expected(
    shapes: Params, patch_size: int
) -> dict[str, tuple[str, int | None, tuple[int, ...]]]:
    """{checkpoint name: (path, index in the stack or None, shape in the checkpoint)}.

    Scales of kernels are in no checkpoint.
    """
    table = {}
    for path, leaf in shapes.items():
        if quantised.is_scale(path):
            continue
        names, stacked = torch_names(path), _is_stack(path)
        layer = tuple(leaf.shape[1:] if stacked else leaf.shape)
        shape = _torch_shape(path, layer, patch_size if path == PATCHES else None)
        for i, torch_name in enumerate(names):
            table[torch_name] = (path, i if stacked else None, shape)
    return table


def _check(
    found: Mapping[str, tuple[int, ...]],
    table: Mapping[str, Any],
    ignore: Iterable[str],
    where: str,
) -> None:
    missing = sorted(set(table) - set(found))
    extra = sorted(set(found) - set(table) - set(ignore))
    bad = [
        f"{name}: file {tuple(found[name])}, model {table[name][2]}"
        for name in sorted(set(found) & set(table))
        if tuple(found[name]) != tuple(table[name][2])
    ]
    if missing or extra or bad:
        lines = [f"{where}: the weights do not fit the model that its config describes."]
        for title, rows in (("missing", missing), ("not in the model", extra), ("misshapen", bad)):
            if rows:
                lines.append(f"  {title} ({len(rows)}): " + ", ".join(rows))
        raise ValueError("\n".join(lines))


def _fill(buffer: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(buffer, layer, index, 0)


@cache
def _filler(sharding: Any) -> Callable[..., jax.Array]:
    """Return a jitted function that writes a layer into a buffer in place, on the same devices."""
    return jax.jit(_fill, donate_argnums=0, out_shardings=sharding)


def assemble(
    tensors: Iterable[tuple[str, Callable[[], np.ndarray]]],
    shapes: Params,
    *,
    dtype: Any = jnp.float32,
    patch_size: int = 2,
    place: Place | None = None,
) -> Params:
    """Our parameters from the checkpoint's tensors, read one by one through the given callables."""
    table = _expected(shapes, patch_size)
    params: Params = {}
    for torch_name, read in tensors:
        if torch_name not in table:
            continue
        path, index, _ = table[torch_name]
        for part, value in _stored(path, _from_torch(path, read()), shapes, dtype).items():
            sharding = place(part, shapes[part]) if place else None
            if index is None:
                params[part] = jax.device_put(value, sharding)
                continue
            if part not in params:
                params[part] = jnp.zeros(shapes[part].shape, value.dtype, device=sharding)
            params[part] = _filler(sharding)(params[part], value, index)
    return params


def _stored(path: str, tensor: Any, shapes: Params, dtype: Any) -> dict[str, np.ndarray]:
    """A parameter, or one layer of it, as it is stored: a quantised kernel has its scale beside."""
    tensor, scale = np.asarray(tensor), path + quantised.SCALE
    if scale not in shapes:
        return {path: tensor.astype(dtype)}
    parts = quantised.quantise(tensor)
    return {name: np.asarray(part) for name, part in zip((path, scale), parts)}


def from_torch_names(
    tensors: Mapping[str, np.ndarray],
    shapes: Params,
    *,
    dtype: Any = jnp.float32,
    patch_size: int = 2,
    ignore: Iterable[str] = (),
) -> Params:
    """Our parameters from a state dict of numpy arrays. Raises ValueError on any mismatch."""
    readers = {k: Tensor(tuple(v.shape), partial(np.asarray, v)) for k, v in tensors.items()}
    return from_tensors(
        readers, shapes, where="state dict", dtype=dtype, patch_size=patch_size, ignore=ignore
    )


def from_tensors(
    tensors: Tensors,
    shapes: Params,
    *,
    where: str,
    dtype: Any = jnp.float32,
    patch_size: int = 2,
    ignore: Iterable[str] = (),
    place: Place | None = None,
) -> Params:
    """Our parameters from a file's tensors, checked whole before the first one is read.

    Args:
      where: the name of the file in the error. The other arguments are those of `load`.
    """
    found = {name: tensor.shape for name, tensor in tensors.items()}
    _check(found, _expected(shapes, patch_size), ignore, where)
    readers = ((name, tensor.read) for name, tensor in tensors.items())
    return assemble(readers, shapes, dtype=dtype, patch_size=patch_size, place=place)


def under_own_names(tensors: Tensors, tied: Mapping[str, str]) -> Tensors:
    """Rename the tensors that are stored only under their second name to their first name.

    Args:
      tied: {second name: first name} of tensors that a module uses twice. Files hold one or both.
    """
    return {
        tied[name] if name in tied and tied[name] not in tensors else name: tensor
        for name, tensor in tensors.items()
    }


def fit(
    directory: str | Path,
    shapes: Params,
    *,
    patch_size: int = 2,
    ignore: Iterable[str] = (),
    tied: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise the errors that `load` would raise, after reading only the headers of the files."""
    found = under_own_names(from_safetensors(component_files(Path(directory))), tied)
    shapes_found = {name: tensor.shape for name, tensor in found.items()}
    _check(shapes_found, _expected(shapes, patch_size), ignore, str(directory))


def load(
    directory: str | Path,
    shapes: Params,
    *,
    dtype: Any = jnp.float32,
    patch_size: int = 2,
    ignore: Iterable[str] = (),
    tied: Mapping[str, str] = MappingProxyType({}),
    place: Place | None = None,
) -> Params:
    """A component's weights from its folder, checked whole before the first tensor is read.

    Args:
      directory: folder with one or more safetensors files (and an index when sharded).
      shapes: {path: ShapeDtypeStruct} from `layers.functional` on the abstract model.
      dtype: dtype on the device, whatever the file holds, of all that is not quantised.
      patch_size: of the patch projection, which is a convolution in the file.
      ignore: names that may be in the file and are not wanted (tied duplicates).
      tied: {second name: first name} of tensors that may be stored under either.
      place: where each parameter lives; default device without it.
    Raises:
      FileNotFoundError: no such folder, or it lacks the named file or a shard.
      ValueError: lists every missing, extra or misshapen tensor.
    """
    return from_tensors(
        under_own_names(from_safetensors(component_files(Path(directory))), tied),
        shapes,
        where=str(directory),
        dtype=dtype,
        patch_size=patch_size,
        ignore=ignore,
        place=place,
    )


def to_torch_names(params: Params, *, patch_size: int = 2) -> dict[str, np.ndarray]:
    """The inverse of `from_torch_names`: a state dict of contiguous numpy arrays."""
    tensors = {}
    for torch_name, (path, index, shape) in _expected(params, patch_size).items():
        x = np.asarray(params[path] if index is None else params[path][index])
        tensors[torch_name] = np.ascontiguousarray(_to_torch(path, x, shape))
    return tensors


def save(params: Params, file: str | Path, *, dtype: Any = np.float32, patch_size: int = 2) -> None:
    """Write a component as one safetensors file under the checkpoint's names."""
    tensors = {k: v.astype(dtype) for k, v in to_torch_names(params, patch_size=patch_size).items()}
    save_file(tensors, str(file), metadata={"format": "pt"})
