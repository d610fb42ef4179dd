"""The queries, keys and values of streams of tokens, which attention kernels take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-6  # of the RMSNorm of queries and keys


class Stream(NamedTuple):
    """Queries, keys and values [B, S, N D] of one stream, such as the text, as linears write them.

    `q_scale`, `k_scale` [D]: the scales of an RMSNorm of each head, which an attention kernel
    applies before its products; None for no norm.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_scale: jax.Array | None = None
    k_scale: jax.Array | None = None


# (streams, number of heads) -> for each stream [B, S, N D]. All tokens attend to all.
Kernel = Callable[[Sequence[Stream], int], list[jax.Array]]

# (q [B, S, N, D], k [B, T, N, D], v [B, T, N, D]) -> [B, S, N, D], in N heads
HeadAttention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def joined(attention: HeadAttention) -> Kernel:
    """Return the kernel that puts the tokens of all streams behind each other for `attention`."""

    def attend(streams: Sequence[Stream], heads: int) -> list[jax.Array]:
        parts = [_by_heads(stream, heads) for stream in streams]
        q, k, v = parts[0] if len(parts) == 1 else (_behind(each) for each in zip(*parts))
        y = attention(q, k, v)
        ends = list(accumulate(stream.q.shape[1] for stream in streams))
        return jnp.split(y.reshape(*y.shape[:2], -1), ends[:-1], axis=1)

    return attend


def _behind(parts: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts, axis=1)


def _by_heads(stream: Stream, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v [B, S, N, D], the first two after their norm."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (stream.q, stream.k, stream.v))
    return head_norm(q, stream.q_scale), head_norm(k, stream.k_scale), v


def head_norm(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """RMSNorm of the channels of a head, statistics in f32, as `nnx.RMSNorm`; x for no scale."""
    if scale is None:
        return x
    if x.dtype != jnp.float32:
        # Without it XLA has the product before this write f32 to memory, and moves that to
        # another layout: on TPUs an attention then takes one and a half times as long.
        x = jax.lax.optimization_barrier(x)
    y = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
    return (y * (size * scale)).astype(x.dtype)
