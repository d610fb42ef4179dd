"""Joint attention of token streams for TPUs: a Pallas kernel that keeps the layout of linears.

XLA pads arrays with an axis of heads, [B, S, N, 64], to the 128 lanes of a TPU's vector, and other
kernels want the heads before the tokens: both are copied before and after each attention. This one
reads queries, keys and values [B, S, N D] as linears write them, image and text apart, and
normalises them itself. It moves what attention has to read and write, and nothing else.
joint_kernel.py has what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flowgrpo_jax.models import joint_kernel
from flowgrpo_jax.models.joint_kernel import LANES, Shape
from flowgrpo_jax.models.streams import Stream

# Bytes of on-chip memory: every kernel has the first; the second fits v5p, which has 63.9 MiB.
LEAST, MOST = 16 << 20, 60 << 20


def fits(streams: Sequence[Stream], heads: int) -> bool:
    """Whether heads fill vectors, one or several in each, and all tokens fit the chip's memory.

    At 60 MiB that is for images of up to 1,280 px.
    """
    shape = _shape(streams, heads)
    one, several = shape.channels % LANES == 0, LANES % shape.channels == 0
    filled = one or (several and shape.width % LANES == 0)
    return filled and _memory(shape, streams[0].q.dtype.itemsize) <= MOST


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(streams: Sequence[Stream], heads: int) -> list[jax.Array]:
    """Attention of all tokens to all, in the form of `models.streams.Kernel`.

    Outside of a TPU it runs in Pallas' interpreter alone (`pltpu.force_tpu_interpret_mode`).
    Raises ValueError for streams that do not fit it.
    """
    shape = _shape(streams, heads)
    if not fits(streams, heads):
        raise ValueError(
            f"{heads} heads of {shape.channels} channels and {sum(shape.tokens)} tokens do not fit:"
            f" heads have to fill vectors of {LANES} channels, and tokens {MOST >> 20} MiB; choose"
            " model.attention='flash'"
        )
    products = 2  # the scores, and their shares with the values
    like = [stream.q for stream in streams]
    return _call(joint_kernel.forward, shape, products, [_by_lanes(streams, shape)], like)


def _shape(streams: Sequence[Stream], heads: int) -> Shape:
    images, _, width = streams[0].q.shape
    return Shape(images, tuple(s.q.shape[1] for s in streams), width, width // heads)


def _memory(shape: Shape, itemsize: int) -> int:
    """Bytes of on-chip memory that the gradient takes, which takes more than the values."""
    tokens = sum(shape.tokens)
    moved = 2 * 7 * tokens * shape.lanes * itemsize  # the next program's are fetched meanwhile
    sums = 2 * 4 * tokens * shape.lanes
    scores = 8 * 4 * tokens * shape.block
    return moved + sums + scores


def _by_lanes(streams: Sequence[Stream], shape: Shape) -> list[Stream]:
    """The streams with the scales of their norms repeated for the heads of a vector, [1, lanes]."""

    def repeated(scale: jax.Array) -> jax.Array:
        return jnp.tile(scale.astype(jnp.float32), shape.lanes // shape.channels)[None]

    return [Stream(*s[:3], *(jax.tree.map(repeated, scale) for scale in s[3:])) for s in streams]


def _call(
    body: Callable[..., None],
    shape: Shape,
    products: int,
    arrays: Any,
    like: Any,
    scratch: Any = (),
) -> Any:
    """Run a kernel for each image and vector of heads.

    Args:
      products: as many as a pair of tokens needs of each head.
      arrays: what the kernel reads.
      like: a tree of arrays that the results are like.
      scratch: memory of the kernel.
    """

    def part(x: Any) -> pl.BlockSpec:
        if x.ndim == 2:  # the scale of a norm
            return pl.BlockSpec((1, shape.lanes), lambda image, vector: (0, 0))
        if x.ndim == 4:  # the gradient of one, for each image and vector
            return pl.BlockSpec((1, 1, 1, shape.lanes), lambda image, vector: (image, vector, 0, 0))
        return pl.BlockSpec((1, x.shape[1], shape.lanes), lambda image, vector: (image, 0, vector))

    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, like)))
    pairs = shape.images * sum(shape.tokens) ** 2
    grid = (shape.images, shape.width // shape.lanes)
    memory = _memory(shape, jax.tree.leaves(arrays)[0].dtype.itemsize)
    (found,) = pl.pallas_call(
        partial(body, shape),
        grid=grid,
        in_specs=jax.tree.map(part, arrays),
        out_specs=[jax.tree.map(part, like)],
        out_shape=[jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=max(LEAST, memory)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * shape.width,
            bytes_accessed=moved,
            transcendentals=pairs * (shape.width // shape.channels),
        ),
        name=f"joint_attention_{body.__name__}",
    )(*arrays)
    return found


# --------------------------------------------------------------------------------- gradient


def _forward(streams: Sequence[Stream], heads: int) -> tuple[list[jax.Array], Any]:
    return attend(streams, heads), streams


def _backward(heads: int, streams: Sequence[Stream], cotangents: Any) -> tuple[list[Stream]]:
    shape = _shape(streams, heads)
    vectors = shape.width // shape.lanes
    sums = jax.ShapeDtypeStruct((shape.images, vectors, 1, shape.lanes), jnp.float32)
    like = [Stream(*s[:3], *(jax.tree.map(lambda _: sums, x) for x in s[3:])) for s in streams]
    memory = [pltpu.VMEM((tokens, shape.lanes), jnp.float32) for tokens in shape.tokens]
    arrays = [_by_lanes(streams, shape), list(cotangents)]
    products = 5  # scores again, and the gradients to shares, queries, keys and values
    found = _call(joint_kernel.backward, shape, products, arrays, like, [memory, memory])

    def of_scale(scale: jax.Array, gradient: jax.Array) -> jax.Array:
        return gradient.reshape(-1, shape.channels).sum(0).astype(scale.dtype)

    return (
        [
            Stream(*g[:3], *(jax.tree.map(of_scale, *pair) for pair in zip(s[3:], g[3:])))
            for s, g in zip(streams, found)
        ],
    )


attend.defvjp(_forward, _backward)
