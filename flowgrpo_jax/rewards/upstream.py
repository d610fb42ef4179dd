"""Clients of yifan123/reward-server, upstream's servers for GenEval and DeQA, which speak pickle.

These clients are for users who run such servers already; new servers should use the protocol of
`remote`. A pickle can run any code where it is read, so the answers are read by an unpickler that
knows plain containers, strings, numbers, and NumPy's numeric arrays and scalars, and builds the
latter itself: nothing that the answer names is looked up or called.

The protocol: POST / with the pickle of {"images": [JPEG bytes of quality 75], ...}, at most 64
images; the answer is the pickle of a dict of lists, or status 500 with a traceback.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import pickle
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from flowgrpo_jax.rewards.geneval import check
from flowgrpo_jax.transport import http_client
from flowgrpo_jax.types import Metadata

log = logging.getLogger(__name__)

GENEVAL_FIELDS = ("scores", "rewards", "strict_rewards")


# --------------------------------------------------------------------- pickles without their code
# Every class has __setstate__: without one, a pickle could set attributes on the class itself.


class _Dtype:
    """Stands for numpy.dtype: a numeric type."""

    def __init__(self, code: Any, *_: Any):
        if not isinstance(code, str) or not re.fullmatch("[biuf][1248]", code):
            raise pickle.UnpicklingError(f"an array of type {code!r}: only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, *rest = state
        if order not in ("<", ">", "|", "=") or rest[:3] != [None, None, None]:
            raise pickle.UnpicklingError(f"an array of type {state!r}: only numbers are read")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for numpy.ndarray; `values` is the array."""

    values = np.zeros(0)

    def __init__(self, *_: Any):
        """Ignore the arguments; `__setstate__` gets the contents of the array."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array that is not made of bytes")
        flat = np.frombuffer(data, dtype.dtype)
        self.values = flat.reshape(shape, order="F" if fortran else "C")


class _Scalar:
    """Stands for a NumPy number; `values` is an array with it."""

    values: np.ndarray = np.zeros(0)

    def __init__(self, dtype: Any, data: Any):
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("a NumPy scalar that is not made of bytes")
        self.values = np.frombuffer(data, dtype.dtype).reshape(())

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a NumPy scalar with a state")


KNOWN = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Array} | {
    (f"numpy.{core}.multiarray", name): stands
    for core in ("core", "_core")  # before and from NumPy 2
    for name, stands in (("_reconstruct", _Array), ("scalar", _Scalar))
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def loads(data: bytes) -> Any:
    """A pickle of plain containers, strings, numbers and NumPy numbers; read those with `numbers`.

    Raises ValueError for any other.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # what a hostile or broken pickle raises has no common type
        raise ValueError(f"the answer is no pickle that is safe to read: {error}") from error


def numbers(value: Any, n: int) -> np.ndarray:
    """n numbers f32 [n] out of what `loads` returned. Raises ValueError for anything else."""
    if isinstance(value, _Array):
        values = value.values
    elif isinstance(value, list | tuple):
        plain = [v.values if isinstance(v, _Array | _Scalar) else v for v in value]
        if not all(isinstance(v, int | float | np.ndarray) and np.ndim(v) == 0 for v in plain):
            raise ValueError("the answer's list holds something else than numbers")
        try:
            values = np.array(plain, np.float64)
        except OverflowError as error:
            raise ValueError("the answer holds an integer beyond all floats") from error
    else:
        raise ValueError(f"the answer has {type(value).__name__} where numbers should be")
    if values.shape != (n,):
        raise ValueError(f"the answer has numbers of shape {values.shape} for {n} images")
    return values.astype(np.float32)


# -------------------------------------------------------------------------------- the rewards


@dataclasses.dataclass(frozen=True)
class Upstream:
    """A reward that asks `replicas`, 64 images at a time."""

    replicas: http_client.Replicas
    request: Callable[[list[bytes], Sequence[Metadata]], dict[str, Any]]
    field: str  # of the answer
    scale: float  # score = number in the answer / scale
    check: Callable[[Metadata], None] = lambda record: None  # raises for what it cannot judge
    batch: int = 64

    def ready(self) -> None:
        """Raise RuntimeError unless something answers; these servers have no health check."""

        def probe(url: str) -> None:
            try:
                http_client.request(url + "/", timeout=self.replicas.timeout)
            except http_client.Refused:
                log.debug("%s answers, if only that it takes no GET", url)

        self.replicas.check("upstream reward server", probe)

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The server's numbers / scale, f32 [B]; valid where they came and are finite."""

        def ask(start: int) -> np.ndarray:
            rows = slice(start, start + self.batch)
            pictures = [_jpeg(image) for image in images[rows]]
            body = pickle.dumps(self.request(pictures, metadata[rows]), protocol=4)
            try:
                answer = loads(self.replicas.post("/", body, "application/octet-stream"))
                if not isinstance(answer, dict) or self.field not in answer:
                    raise ValueError(f"the answer has no {self.field!r}")
                return numbers(answer[self.field], len(pictures)) / np.float32(self.scale)
            except (http_client.Failed, ValueError) as error:
                log.warning("the upstream reward failed on %d images: %s", len(pictures), error)
                return np.full(len(pictures), np.nan, np.float32)

        with ThreadPoolExecutor(2 * len(self.replicas.urls)) as pool:
            scores = np.concatenate(list(pool.map(ask, range(0, len(images), self.batch))))
        valid = np.isfinite(scores)
        return np.where(valid, scores, 0).astype(np.float32), valid


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, format="JPEG", quality=75)
    return buffer.getvalue()


def geneval(
    urls: str | Sequence[str] = "http://127.0.0.1:18085",
    *,
    field: str = "scores",
    timeout: float = 120.0,
    **options: Any,
) -> Upstream:
    """GenEval by upstream's server.

    Args:
      field: "scores", the graded training reward, whose position clause has upstream's bug and
        which can be negative; "strict_rewards"; or "rewards", GenEval's official verdict.
      timeout, options: those of `http_client.Replicas`.
    """
    if field not in GENEVAL_FIELDS:
        raise ValueError(f"field={field!r} must be one of {', '.join(GENEVAL_FIELDS)}")

    def request(pictures: list[bytes], metadata: Sequence[Metadata]) -> dict[str, Any]:
        # only_strict spares the server the official verdict.
        return {
            "images": pictures,
            "meta_datas": list(metadata),
            "only_strict": field != "rewards",
        }

    replicas = http_client.Replicas(urls, timeout=timeout, **options)
    return Upstream(replicas, request, field, 1.0, check)


def deqa(
    urls: str | Sequence[str] = "http://127.0.0.1:18086", *, timeout: float = 120.0, **options: Any
) -> Upstream:
    """DeQA, quality without regard to the prompt, by upstream's server: its score / 5, 0.2 to 1."""

    def request(pictures: list[bytes], metadata: Sequence[Metadata]) -> dict[str, Any]:
        return {"images": pictures}

    return Upstream(http_client.Replicas(urls, timeout=timeout, **options), request, "outputs", 5.0)
