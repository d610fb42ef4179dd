"""Checkpoint files as named tensors that are read one by one: safetensors, and torch's `.pt`.

A `.pt` file is a zip archive of one pickle and one raw file per storage. The pickle is read here
without torch and without running anything from it: only the few names that a state dict is made of
are understood, every other one is an error.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
WRAPPERS = ("state_dict", "model", "module")  # keys under which training programs put the weights


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def open_file(file: str | Path) -> Tensors:
    """The tensors of one weight file, by its suffix; nothing but names and shapes is read yet.

    Raises:
      ValueError: a damaged file, or a `.pt` that is older than torch 1.6 or holds more than a state
        dict.
    """
    file = Path(file)
    return from_safetensors([file]) if file.suffix == ".safetensors" else from_torch(file)


def open_safetensors(file: Path) -> Any:
    """The opened file. Raises ValueError that names it where it is damaged."""
    try:
        return safe_open(str(file), framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Download or copy it again") from error


def from_safetensors(files: Iterable[Path]) -> Tensors:
    tensors = {}
    for file in files:
        handle = open_safetensors(file)
        for name in handle.keys():  # noqa: SIM118 (a file, no dict)
            shape = tuple(handle.get_slice(name).get_shape())
            tensors[name] = Tensor(shape, partial(handle.get_tensor, name))
    return tensors


def from_torch(file: Path) -> Tensors:
    """The state dict of a file of `torch.save`, bare or under one of `WRAPPERS`."""
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is no zip archive: it is damaged or was written by torch before 1.6; load and"
            " save it again with a newer torch, or convert it to safetensors"
        )
    archive = zipfile.ZipFile(file)
    (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    try:
        with archive.open(index) as stream:
            found = _StateDict(stream, archive, index.removesuffix("data.pkl")).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: {error}; save its state dict alone, with torch.save or as safetensors"
        ) from error
    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected a state dict")
    return {str(name): x for name, x in found.items() if isinstance(x, Tensor)}


class _Storage(NamedTuple):
    """A storage of the archive: its entry, its type and its length."""

    entry: str
    dtype: Any
    size: int


class _StateDict(pickle.Unpickler):
    """Turns tensors into `Tensor` records; refuses all names but those of tensors and dicts."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, root: str):
        super().__init__(stream)
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        }
        known |= {f"torch.{storage}": dtype for storage, dtype in STORAGES.items()}
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no tensor needs")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind!r}, which no tensor needs")
        return _Storage(f"{self.root}data/{key}", dtype, size)

    def tensor(self, storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> Tensor:
        shape, stride = tuple(shape), tuple(stride)
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride))
        inside = min((offset, *shape, *stride), default=0) >= 0 and last < storage.size
        if math.prod(shape) and not inside:
            raise pickle.UnpicklingError(f"a tensor {shape} reaches beyond its {storage}")

        def read() -> np.ndarray:
            flat = np.frombuffer(self.archive.read(storage.entry), storage.dtype)
            if len(flat) < storage.size:
                raise ValueError(f"{storage.entry} holds {len(flat)} of {storage.size} values")
            steps = [flat.itemsize * s for s in stride]
            return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)

        return Tensor(shape, read)
