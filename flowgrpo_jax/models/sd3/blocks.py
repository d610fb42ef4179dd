"""The parts of an MMDiT: its config, its modulation and attention layers, and its blocks.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers" (arXiv 2403.03206), figure 2, and
diffusers' `JointTransformerBlock`, whose parameter names are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowgrpo_jax.models.layers import Linear, timestep_embedding
from flowgrpo_jax.models.products import Product
from flowgrpo_jax.models.streams import Kernel, Stream


@dataclass(frozen=True)
class MMDiTConfig:
    """Fields of a diffusers `transformer/config.json`."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 384
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={self.qk_norm!r}: this MMDiT knows None and 'rms_norm'")
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim={self.caption_projection_dim} must equal heads x head_dim"
                f" = {self.width}: both streams share one attention"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def segments(self) -> list[tuple[int, int, bool, bool]]:
        """Runs of equal blocks: (first, end, dual, last)."""
        kinds = [
            (i in self.dual_attention_layers, i == self.num_layers - 1)
            for i in range(self.num_layers)
        ]
        runs, start = [], 0
        for (dual, last), run in groupby(kinds):
            end = start + len(list(run))
            runs.append((start, end, dual, last))
            start = end
        return runs


class Maker:
    """Layers with the model's width and dtype filled in, so that the blocks read short."""

    def __init__(
        self,
        config: MMDiTConfig,
        dtype: Any,
        attention: Kernel,
        product: Product,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.rngs = config, dtype, rngs
        self.attention, self.product = attention, product

    def linear(self, n_in: int, n_out: int) -> Linear:
        return Linear(n_in, n_out, dtype=self.dtype, product=self.product, rngs=self.rngs)

    def head_norm(self) -> HeadNorm:
        return HeadNorm(self.config.attention_head_dim)


class HeadNorm(nnx.Module):
    """The scale of an RMSNorm of each head's channels, which the attention kernel applies."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without affine, epsilon 1e-6, statistics in f32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x [B, S, D] scaled and shifted by [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class AdaNorm(nnx.Module):
    """The modulation vectors of a block, from the conditioning vector [B, D]."""

    def __init__(self, chunks: int, make: Maker):
        self.chunks = chunks
        self.linear = make.linear(make.config.width, chunks * make.config.width)

    def __call__(self, temb: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(nnx.silu(temb)), self.chunks, axis=-1)


class Projection(nnx.Module):
    """One activation between two linears: `time_text_embed`'s two parts."""

    def __init__(self, n_in: int, make: Maker):
        width = make.config.width
        self.linear_1, self.linear_2 = make.linear(n_in, width), make.linear(width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class TimeTextEmbed(nnx.Module):
    def __init__(self, make: Maker):
        self.timestep_embedder = Projection(256, make)
        self.text_embedder = Projection(make.config.pooled_projection_dim, make)

    def __call__(self, timestep: jax.Array, pooled: jax.Array) -> jax.Array:
        return self.timestep_embedder(timestep_embedding(timestep, 256)) + self.text_embedder(
            pooled
        )


class Gelu(nnx.Module):
    def __init__(self, n_in: int, n_out: int, make: Maker):
        self.proj = make.linear(n_in, n_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.gelu(self.proj(x), approximate=True)


class FeedForward(nnx.Module):
    def __init__(self, make: Maker):
        width = make.config.width
        self.net = nnx.Dict({"0": Gelu(width, 4 * width, make), "2": make.linear(4 * width, width)})

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net["2"](self.net["0"](x))


class Attention(nnx.Module):
    """Self-attention of one stream, or joint attention of two.

    `context` is the role of the text stream: absent, "full", or "last" (keys and values only).
    """

    def __init__(self, context: str | None, make: Maker):
        width, qk_norm = make.config.width, make.config.qk_norm
        self.heads, self.attention = make.config.num_attention_heads, make.attention
        self.to_q, self.to_k, self.to_v = (make.linear(width, width) for _ in range(3))
        self.to_out = nnx.List([make.linear(width, width)])
        if qk_norm:
            self.norm_q, self.norm_k = make.head_norm(), make.head_norm()
        if context:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (
                make.linear(width, width) for _ in range(3)
            )
            if qk_norm:
                self.norm_added_q, self.norm_added_k = make.head_norm(), make.head_norm()
        if context == "full":
            self.to_add_out = make.linear(width, width)

    def __call__(
        self, x: jax.Array, c: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:  # the second is None where the text stream ends
        streams = [self.stream(x, "to_q", "to_k", "to_v", "norm_q", "norm_k")]
        if c is not None:
            added = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
            streams.append(self.stream(c, *added))
        y, *others = self.attention(streams, self.heads)
        return self.to_out[0](y), self.to_add_out(*others) if hasattr(self, "to_add_out") else None

    def stream(self, x: jax.Array, q: str, k: str, v: str, norm_q: str, norm_k: str) -> Stream:
        """The queries, keys and values of x by the linears and norms of these names."""
        linears = (getattr(self, name) for name in (q, k, v))
        norms = (getattr(self, name, None) for name in (norm_q, norm_k))
        scales = (None if norm is None else norm.scale[...] for norm in norms)
        return Stream(*(linear(x) for linear in linears), *scales)


class Block(nnx.Module):
    """One joint block. `dual` adds a second, image-only attention; `last` drops the text output."""

    def __init__(self, dual: bool, last: bool, make: Maker):
        self.norm1 = AdaNorm(9 if dual else 6, make)
        self.norm1_context = AdaNorm(2 if last else 6, make)
        self.attn = Attention("last" if last else "full", make)
        if dual:
            self.attn2 = Attention(None, make)
        self.ff = FeedForward(make)
        if not last:
            self.ff_context = FeedForward(make)

    def __call__(self, x: jax.Array, c: jax.Array, temb: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Image tokens x [B, S, D], text tokens c [B, L, D], conditioning temb [B, D]."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(temb)
        normed = layer_norm(x)
        if last := not hasattr(self, "ff_context"):
            c_scale, c_shift = self.norm1_context(temb)
        else:
            c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = self.norm1_context(temb)
        attended, c_attended = self.attn(
            modulate(normed, shift, scale), modulate(layer_norm(c), c_shift, c_scale)
        )
        x = x + gate[:, None] * attended
        if second:
            shift2, scale2, gate2 = second
            x = x + gate2[:, None] * self.attn2(modulate(normed, shift2, scale2))[0]
        x = x + gate_ff[:, None] * self.ff(modulate(layer_norm(x), shift_ff, scale_ff))
        if last:
            return x, c
        c = c + c_gate[:, None] * c_attended
        c = c + c_gate_ff[:, None] * self.ff_context(
            modulate(layer_norm(c), c_shift_ff, c_scale_ff)
        )
        return x, c
