"""Frozen kernels that are stored in 8 bits, and made floating point again where they are used.

A kernel [..., n_in, n_out] becomes int8 of the same shape, and beside it there is a `kernel_scale`
f32 [..., 1, n_out], one for each output, so that the largest weight of an output is 127.5 of its
scale. Products are those of the compute dtype; only the storage is small. Quantised by qwix
(github.com/google/qwix), the extra `int8` of this package.

docs/memory.md has the error, and that of qwix's `nf4`, which is ten times as large and left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flowgrpo_jax.models.products import Product

INT8 = "int8"  # the only value of config.model.base_dtype besides ""
SCALE = "_scale"  # what the path of a scale has in addition to its kernel's


def setting(
    base_dtype: str, rank: int, known: tuple[str, ...], knob: str = "model.base_dtype"
) -> dict[str, str]:
    """Return the setting that makes a model store its kernels so; nothing for "".

    Args:
      base_dtype: as the user gave it, by `knob`; rank: of the adapter; known: those that the kind
        of model has.

    Raises ValueError where the frozen kernels cannot be stored so.
    """
    if not base_dtype:
        return {}
    knob = f"{knob}={base_dtype!r}"
    if base_dtype not in known:
        choices = " or ".join(map(repr, ("", *known)))
        raise ValueError(f"{knob}: this kind of model takes {choices}, where '' is model.dtype")
    if not rank:
        raise ValueError(
            f"{knob} with lora.rank=0: in full fine-tuning all kernels are trained and none is"
            " frozen; set lora.rank, or leave model.base_dtype empty"
        )
    if importlib.util.find_spec("qwix") is None:
        raise ValueError(f"{knob} needs qwix: pip install 'flowgrpo_jax[int8]'")
    return {"base_dtype": base_dtype}


def is_scale(path: str) -> bool:
    """Whether a parameter is the scale of a quantised kernel; CLIP's logit_scale is not."""
    return path.endswith("kernel" + SCALE)


def paths(params: Mapping[str, Any]) -> set[str]:
    """Return the paths of the kernels that are quantised, and of their scales."""
    scales = {path for path in params if is_scale(path)}
    return scales | {path.removesuffix(SCALE) for path in scales}


def others_dtype(params: Mapping[str, Any]) -> Any:
    """Return the dtype of the parameters that are not quantised, which all have the same."""
    return next(params[path].dtype for path in params.keys() - paths(params))


def shapes(kernel: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the shapes of a quantised kernel [..., n_in, n_out] and of its scale."""
    *stacked, _, n_out = kernel
    scale = jax.ShapeDtypeStruct((*stacked, 1, n_out), jnp.float32)
    return jax.ShapeDtypeStruct(kernel, jnp.int8), scale


@jax.jit
def quantise(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantise a kernel [n_in, n_out]: int8 of its shape, and its scale f32 [1, n_out]."""
    import qwix

    found = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=(1,))
    return found.qvalue, found.scale


def dequantise(kernel: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Return a quantised kernel in a floating dtype, to which it is rounded once."""
    import qwix

    return qwix.dequantize(qwix.QArray(kernel, scale)).astype(dtype)


# No copy of the floating kernel is kept for the backward pass.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def product(x: jax.Array, kernel: jax.Array, scale: jax.Array, multiply: Product) -> jax.Array:
    """Return x W of rows x. Integers are exact in the dtype of x, and outputs scaled at the end."""
    return (multiply(x, kernel.astype(x.dtype)) * scale[0]).astype(x.dtype)
