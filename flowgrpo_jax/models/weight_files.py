"""Weight files: which ones a component has, and their tensors, which are read one by one.

The formats are safetensors and torch's `.pt`. A `.pt` file is a zip archive of one pickle and one
raw file per storage. The pickle is read here without torch and without running anything from it:
only the few names that a state dict is made of are understood, every other one is an error.
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

from flowgrpo_jax.storage.files import read_json

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
IMAGES = "diffusion_pytorch_model"  # how diffusers names the weights of its own components
WRAPPERS = ("state_dict", "model", "module")  # keys under which training programs put the weights


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def component_files(directory: Path) -> list[Path]:
    """The files that hold the weights of a component of a diffusers directory.

    As diffusers and transformers do, this takes the named file or the files of the named index, and
    nothing that lies beside them. The half-precision twin (`.fp16.`) is the second choice.

    Raises:
      FileNotFoundError: no such folder, or it lacks the named file or one that its index lists.
      ValueError: a damaged index.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} does not exist: a model directory in diffusers layout has one folder per"
            " component; give one that was downloaded whole"
        )
    found = next((name for name in _weight_names(directory) if (directory / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(_no_weights(directory))
    if not found.endswith(".json"):
        return [directory / found]
    listed = read_json(directory / found)
    if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict):
        raise ValueError(
            f"{directory / found} has no weight_map, which says where each tensor is: download the"
            " component again"
        )
    names = sorted(set(listed["weight_map"].values()))
    if absent := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(absent)}: download the component again"
        )
    return [directory / name for name in names]


def _weight_names(directory: Path) -> list[str]:
    """The names that a component's weights may have, the first choice first.

    The libraries differ in what goes first: transformers prefers the file, diffusers the index.
    """
    file, index = "{}{}.safetensors", "{}.safetensors.index{}.json"
    text, images = [("model", file), ("model", index)], [(IMAGES, index), (IMAGES, file)]
    order = text + images if directory.name.startswith("text_encoder") else images + text
    return [name.format(stem, variant) for variant in ("", ".fp16") for stem, name in order]


def _no_weights(directory: Path) -> str:
    """Return the message for a component's folder without a weight file of the right name."""
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    if not others:
        return f"{directory} lacks any .safetensors file: download the component again"
    stem = "model" if directory.name.startswith("text_encoder") else IMAGES
    return (
        f"{directory} lacks {stem}.safetensors, or its {stem}.safetensors.index.json: other files"
        f" are not read ({', '.join(others)}). Rename the right one to {stem}.safetensors, or"
        " download the component again"
    )


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
    """The tensors of all these files. Raises ValueError for one that two of them hold."""
    tensors: Tensors = {}
    source: dict[str, Path] = {}
    for file in files:
        handle = open_safetensors(file)
        for name in handle.keys():  # noqa: SIM118 (a file, no dict)
            if name in source:
                raise ValueError(
                    f"{name} is in {source[name]} and in {file.name}: download the component again"
                )
            source[name] = file
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
        raise ValueError(
            f"{file} holds a {type(found).__name__}, expected a state dict: save"
            " model.state_dict() alone"
        )
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
