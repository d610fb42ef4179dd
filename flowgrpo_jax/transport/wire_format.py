"""The messages between a reward server and its client: JSON, never pickle.

    request   {"images": {"png": [base64, ...]} or {"npy": base64}, "prompts": [...],
               "metadata": [{...}, ...]}
    answer    {"scores": [...], "valid": [...]}

"npy" is one uint8 array [B, H, W, 3] in NumPy's file format. A message is checked before memory is
allocated for it, so that a header which announces gigabytes is refused.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flowgrpo_jax.storage import pictures
from flowgrpo_jax.types import Metadata

FORMS = ("png", "npy")


class Limits(NamedTuple):
    """The largest request that a server accepts."""

    images: int = 256
    side: int = 2048  # px
    bytes: int = 384 << 20  # of the request's body, and of its images unpacked


def encode(
    images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata], form: str = "png"
) -> bytes:
    """A request. PNG is lossless and smaller; npy takes no time to make.

    Raises TypeError for metadata that JSON does not have.
    """
    images = np.asarray(images)
    if form == "png":
        data: Any = [_base64(_png(image)) for image in images]
    else:
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(images), allow_pickle=False)
        data = _base64(buffer.getvalue())
    message = {"images": {form: data}, "prompts": list(prompts), "metadata": list(metadata)}
    return json.dumps(message).encode()


def decode(body: bytes, limits: Limits) -> tuple[np.ndarray, list[str], list[Metadata]]:
    """A request's images uint8 [B, H, W, 3], B prompts and B metadata.

    Raises ValueError that says what is wrong with it.
    """
    message = _object(body, "the request")
    images = message.get("images")
    if not isinstance(images, dict) or len(images) != 1 or not set(images) <= set(FORMS):
        raise ValueError(f"images must be an object with one of the keys {', '.join(FORMS)}")
    ((form, data),) = images.items()
    images = _pictures(data, limits) if form == "png" else _array(data, limits)
    prompts, metadata = message.get("prompts"), message.get("metadata")
    n = len(images)
    if not _list_of(str, prompts, n) or not _list_of(dict, metadata, n):
        raise ValueError(f"prompts and metadata must be lists of {n} strings and {n} objects")
    return images, prompts, metadata  # type: ignore[return-value]


def encode_scores(scores: np.ndarray, valid: np.ndarray) -> bytes:
    """An answer; scores that are not finite become invalid."""
    valid = valid & np.isfinite(scores)
    scores = np.where(valid, scores, 0.0)
    return json.dumps({"scores": scores.tolist(), "valid": valid.tolist()}).encode()


def decode_scores(body: bytes, n: int) -> tuple[np.ndarray, np.ndarray]:
    """An answer's scores f32 [n] and validity bool [n]. Raises ValueError for anything else."""
    message = _object(body, "the answer")
    scores, valid = message.get("scores"), message.get("valid")
    if not _list_of((int, float), scores, n) or not _list_of(bool, valid, n):
        raise ValueError(f"the answer must hold {n} numbers as scores and {n} booleans as valid")
    try:
        return np.array(scores, np.float32), np.array(valid, bool)
    except OverflowError as error:
        raise ValueError("the answer holds an integer beyond all floats") from error


def _object(body: bytes, what: str) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise ValueError(f"{what} must be an object, not {type(message).__name__}")
    return message


def _list_of(kind: Any, values: Any, n: int) -> bool:
    return (
        isinstance(values, list) and len(values) == n and all(isinstance(v, kind) for v in values)
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("images must be base64 strings")
    return base64.b64decode(text, validate=True)  # its error is a ValueError


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _check(shape: tuple[int, ...], limits: Limits) -> None:
    n, height, width, channels = shape
    if not 0 < n <= limits.images:
        raise ValueError(f"{n} images in a request: it must be 1 to {limits.images}")
    if not 0 < min(height, width) <= max(height, width) <= limits.side or channels != 3:
        raise ValueError(
            f"images of {height} x {width} px and {channels} channels: the sides must be 1 to"
            f" {limits.side} px and the channels 3"
        )
    if n * height * width * channels > limits.bytes:
        raise ValueError(f"{n} images of {height} x {width} px are more than {limits.bytes} bytes")


def _pictures(data: Any, limits: Limits) -> np.ndarray:
    if not isinstance(data, list):
        raise ValueError("images.png must be a list")
    files = []
    for text in data[: limits.images]:
        try:
            file = Image.open(io.BytesIO(_bytes(text)), formats=["PNG"])  # reads the header alone
        except Exception as error:  # Pillow's errors have no common type
            raise ValueError(f"an image is no PNG: {error}") from error
        files.append(file)
    if len({tuple(sorted(file.size)) for file in files}) > 1:
        raise ValueError(f"images of several sizes: {sorted({file.size for file in files})}")
    width, height = files[0].size if files else (1, 1)
    _check((len(data), height, width, 3), limits)
    try:
        read = [pictures.pixels(file) for file in files]
    except Exception as error:
        raise ValueError(f"an image is a broken PNG: {error}") from error
    if len({image.shape for image in read}) > 1:  # one of two that are turned
        raise ValueError(f"images of several sizes: {sorted({image.shape for image in read})}")
    return np.stack(read)


def _array(data: Any, limits: Limits) -> np.ndarray:
    raw = io.BytesIO(_bytes(data))
    try:
        version = np.lib.format.read_magic(raw)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version)
        if read is None:
            raise ValueError(f"NumPy format {version} instead of (1, 0)")
        shape, fortran, dtype = read(raw)
    except Exception as error:  # the header is Python syntax: there are many ways to be wrong
        raise ValueError(f"images.npy is no array: {error}") from error
    if dtype != np.uint8 or len(shape) != 4 or fortran:
        raise ValueError(f"images.npy is {dtype} {shape}: it must be uint8 [B, H, W, 3], C order")
    _check(shape, limits)
    left = raw.getbuffer()[raw.tell() :]
    if left.nbytes != np.prod(shape, dtype=np.int64):
        raise ValueError(f"images.npy has {left.nbytes} bytes for {shape}")
    return np.frombuffer(left, np.uint8).reshape(shape)
