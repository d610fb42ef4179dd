"""Random streams of tokens for attention kernels, and their attention by flax and jax."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flowgrpo_jax.models.streams import Stream


def streams(lengths, heads, channels, normed, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return [
        Stream(
            *(normal(2, tokens, heads * channels) for _ in "qkv"),
            *(1 + normal(channels) / 2 for _ in "qk" if normed),
        )
        for tokens in lengths
    ]


def by_jax(streams, heads):
    """The same by flax's RMSNorm and jax's attention."""

    def normed(x, scale):
        x = x.reshape(*x.shape[:2], heads, -1)
        norm = nnx.RMSNorm(x.shape[-1], epsilon=1e-6, dtype=x.dtype, rngs=nnx.Rngs(0))
        if scale is None:
            return x
        norm.scale[...] = scale
        return norm(x)

    q, k, v = (
        jnp.concatenate(parts, axis=1)
        for parts in (
            [normed(s.q, s.q_scale) for s in streams],
            [normed(s.k, s.k_scale) for s in streams],
            [normed(s.v, None) for s in streams],
        )
    )
    y = jax.nn.dot_product_attention(q, k, v)
    y = y.reshape(*y.shape[:2], -1)
    ends = np.cumsum([s.q.shape[1] for s in streams])[:-1]
    return jnp.split(y, ends, axis=1)
