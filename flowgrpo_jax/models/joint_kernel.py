"""The bodies of the Pallas kernels of joint_attention.py: what one program of the grid computes.

A program has all tokens of one image, and the heads that share a vector of a TPU. Masks tell these
heads apart: a product over the lanes of two heads takes a TPU's product unit as long as one over
half of them. A query meets all keys at once, so that its softmax is the plain one, and the backward
pass computes it again from queries and keys: the forward pass keeps nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flowgrpo_jax.models.streams import EPSILON, Stream

LANES = 128  # a TPU's vector
SCORES = 640 * 1280  # of a block of queries and all keys: 3.3 MB in f32
LARGEST_BLOCK = 512  # queries


class Shape(NamedTuple):
    """The sizes of the streams that a kernel attends with."""

    images: int
    tokens: tuple[int, ...]  # of each stream
    width: int  # channels of all heads
    channels: int  # of a head

    @property
    def lanes(self) -> int:
        """Channels that a program of the grid has: those of one head, or of several."""
        return max(self.channels, LANES)

    @property
    def block(self) -> int:
        """Queries at once."""
        fitting = SCORES // sum(self.tokens) // LANES * LANES
        return min(max(fitting, LANES), LARGEST_BLOCK)

    def heads(self) -> list[jax.Array]:
        """For each head of a program, 1 in its lanes and 0 in the others: f32 [1, lanes]."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.lanes), 1)
        starts = range(0, self.lanes, self.channels)
        own = ((start <= lane) & (lane < start + self.channels) for start in starts)
        return [lanes.astype(jnp.float32) for lanes in own]


def forward(shape: Shape, streams: list[Stream], outputs: list[Any]) -> None:
    """Write the attention of all tokens to all.

    Args:
      streams: references to q, k and v [1, S, lanes], and to scales [1, lanes].
      outputs: references [1, S, lanes].
    """
    dtype, root = streams[0].q.dtype, shape.channels**-0.5
    keys = [_normed(shape, s.k[0], s.k_scale).astype(dtype) for s in streams]
    values = [s.v[0] for s in streams]

    def block(stream: Stream, output: Any, rows: Any) -> None:
        q = _normed(shape, stream.q[0, rows, :], stream.q_scale)
        y = jnp.zeros_like(q)
        for head in shape.heads():
            parts, total = _exponentials((q * head).astype(dtype), keys, root)
            seen = (_dot(part.astype(dtype), v, (1, 0)) for part, v in zip(parts, values))
            y += reduce(jnp.add, seen) * (head / total)
        output[0, rows, :] = y.astype(dtype)

    for stream, output in zip(streams, outputs):
        _by_blocks(stream.q.shape[1], shape.block, partial(block, stream, output))


def backward(
    shape: Shape,
    streams: list[Stream],
    cotangents: list[Any],
    gradients: list[Stream],
    to_keys: list[Any],
    to_values: list[Any],
) -> None:
    """Write the gradients to all of the streams.

    Args:
      gradients: references as those of the streams, but to scales [1, 1, 1, lanes].
      to_keys, to_values: references to memory for sums, f32 [S, lanes].
    """
    dtype, root = streams[0].q.dtype, shape.channels**-0.5
    keys = [_normed(shape, s.k[0], s.k_scale).astype(dtype) for s in streams]
    values = [s.v[0] for s in streams]
    for memory in (*to_keys, *to_values, *(g.q_scale for g in gradients)):
        if memory is not None:
            memory[...] = jnp.zeros_like(memory)

    def block(stream: Stream, cotangent: Any, gradient: Stream, rows: Any) -> None:
        q = _normed(shape, stream.q[0, rows, :], stream.q_scale)
        dy = cotangent[0, rows, :].astype(jnp.float32)
        dq = jnp.zeros_like(q)
        for head in shape.heads():
            own_q, own_dy = (q * head).astype(dtype), (dy * head).astype(dtype)
            parts, total = _exponentials(own_q, keys, root)
            shares = [part / total for part in parts]
            scores = [s.astype(dtype) for s in _softmax_gradient(shares, own_dy, values, root)]
            dq += reduce(jnp.add, (_dot(s, k, (1, 0)) for s, k in zip(scores, keys))) * head
            for i, (share, score) in enumerate(zip(shares, scores)):
                to_keys[i][...] += _dot(score, own_q, (0, 0))
                to_values[i][...] += _dot(share.astype(dtype), own_dy, (0, 0))
        dx, dscale = _norm_gradient(shape, stream.q[0, rows, :], stream.q_scale, dq)
        gradient.q[0, rows, :] = dx.astype(dtype)
        if gradient.q_scale is not None:
            gradient.q_scale[0, 0] += dscale

    for stream, cotangent, gradient in zip(streams, cotangents, gradients):
        of_rows = partial(block, stream, cotangent, gradient)
        _by_blocks(stream.q.shape[1], shape.block, of_rows)
    for i, (stream, gradient) in enumerate(zip(streams, gradients)):
        dx, dscale = _norm_gradient(shape, stream.k[0], stream.k_scale, to_keys[i][...])
        gradient.k[0] = dx.astype(dtype)
        gradient.v[0] = to_values[i][...].astype(dtype)
        if gradient.k_scale is not None:
            gradient.k_scale[0, 0] = dscale


def _by_blocks(tokens: int, block: int, do: Callable[[Any], None]) -> None:
    """Call `do` for the rows of each block of tokens, the last of which may be smaller."""
    whole, rest = divmod(tokens, block)

    if whole:

        @pl.loop(0, whole)
        def _(i: jax.Array) -> None:
            do(pl.ds(pl.multiple_of(i * block, block), block))

    if rest:
        do(pl.ds(whole * block, rest))


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """The product over axis `over[0]` of a and `over[1]` of b, summed in f32."""
    axes = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


# ---------------------------------------------------------------------------------- softmax


def _exponentials(
    q: jax.Array, keys: Sequence[jax.Array], root: float
) -> tuple[list[jax.Array], jax.Array]:
    """(exp of the scores of each stream's keys [S, T], their sum over all of them [S, 1])."""
    scores = [_dot(q, k, (1, 1)) * root for k in keys]
    largest = reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in scores))
    parts = [jnp.exp(s - largest) for s in scores]
    return parts, reduce(jnp.add, (part.sum(-1, keepdims=True) for part in parts))


def _softmax_gradient(
    shares: Sequence[jax.Array], dy: jax.Array, values: Sequence[jax.Array], root: float
) -> list[jax.Array]:
    """The gradient to `_dot(q, k)` of a head, for the keys of each stream [S, T]."""
    to_shares = [_dot(dy, v, (1, 1)) for v in values]
    sums = ((p * dp).sum(-1, keepdims=True) for p, dp in zip(shares, to_shares))
    mean = reduce(jnp.add, sums)
    return [p * (dp - mean) * root for p, dp in zip(shares, to_shares)]


# ------------------------------------------------------------------------- the heads' RMSNorm


def _normed(shape: Shape, x: jax.Array, scale: Any) -> jax.Array:
    """x [S, lanes] as f32, divided by the root mean square of its head and scaled; x for no norm.

    It is rounded to the type of x, as other kernels round what they write to memory.
    """
    y = x.astype(jnp.float32)
    if scale is None:
        return y
    return (y * (_sizes(shape, y) * scale[...])).astype(x.dtype).astype(jnp.float32)


def _sizes(shape: Shape, x: jax.Array) -> jax.Array:
    """1 / the root mean square of each token's head, in that head's lanes."""
    means = (_head_means(shape, jnp.square(x), head) for head in shape.heads())
    sizes = (jax.lax.rsqrt(mean + EPSILON) * head for mean, head in zip(means, shape.heads()))
    return reduce(jnp.add, sizes)


def _head_means(shape: Shape, x: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.sum(x * head, -1, keepdims=True) / shape.channels


def _norm_gradient(shape: Shape, x: jax.Array, scale: Any, dy: jax.Array) -> tuple[jax.Array, Any]:
    """(gradient to x, gradient to the scale [1, lanes]) of `_normed`."""
    if scale is None:
        return dy, None
    x = x.astype(jnp.float32)
    size = _sizes(shape, x)
    unit, dunit = x * size, dy * scale[...]
    along = (_head_means(shape, unit * dunit, head) * head for head in shape.heads())
    dx = size * (dunit - unit * reduce(jnp.add, along))
    return dx, jnp.sum(unit * dy, 0, keepdims=True)
