"""MMDiT: the transformer of Stable Diffusion 3 and 3.5, two streams that attend to each other.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers" (arXiv 2403.03206), figure 2, and
diffusers' `SD3Transformer2DModel`, whose config fields and parameter names are kept. Channels
come last: latents are [B, H, W, C].

Equal neighbours among the blocks are stacked into segments (SD3.5-medium: dual 0:13, joint 13:23,
last 23:24), so the compiler sees three blocks instead of twenty-four.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from flowgrpo_jax.models import layers
from flowgrpo_jax.models.layers import Linear, timestep_embedding


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

    def __init__(self, config: MMDiTConfig, dtype: Any, attention: str, rngs: nnx.Rngs):
        self.config, self.dtype, self.attention, self.rngs = config, dtype, attention, rngs

    def linear(self, n_in: int, n_out: int) -> Linear:
        return Linear(n_in, n_out, dtype=self.dtype, rngs=self.rngs)

    def head_norm(self) -> nnx.RMSNorm:
        dim = self.config.attention_head_dim
        return nnx.RMSNorm(dim, epsilon=1e-6, dtype=self.dtype, rngs=self.rngs)


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
        self.heads, self.implementation = make.config.num_attention_heads, make.attention
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
        tokens = x.shape[1]
        q, k, v = (self.split(f(x)) for f in (self.to_q, self.to_k, self.to_v))
        if hasattr(self, "norm_q"):
            q, k = self.norm_q(q), self.norm_k(k)
        if c is not None:
            adds = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            cq, ck, cv = (self.split(f(c)) for f in adds)
            if hasattr(self, "norm_added_q"):
                cq, ck = self.norm_added_q(cq), self.norm_added_k(ck)
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in ((q, cq), (k, ck), (v, cv)))
        y = layers.attention(q, k, v, self.implementation)
        y = rearrange(y, "b s n d -> b s (n d)")
        y, y_c = y[:, :tokens], y[:, tokens:]
        return self.to_out[0](y), self.to_add_out(y_c) if hasattr(self, "to_add_out") else None

    def split(self, x: jax.Array) -> jax.Array:
        return rearrange(x, "b s (n d) -> b s n d", n=self.heads)


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


class PatchEmbed(nnx.Module):
    """Patches to tokens plus a fixed sine position grid, cropped around its centre."""

    def __init__(self, make: Maker):
        config = make.config
        self.patch, self.side = config.patch_size, config.pos_embed_max_size
        # As a matrix: a convolution whose stride is its kernel is a linear map of patches.
        self.proj = make.linear(config.patch_size**2 * config.in_channels, config.width)
        self.pos_embed = nnx.Param(jnp.zeros((1, self.side**2, config.width)))

    def __call__(self, latents: jax.Array) -> jax.Array:
        p = self.patch
        tokens = self.proj(rearrange(latents, "b (h p) (w q) c -> b (h w) (c p q)", p=p, q=p))
        h, w = latents.shape[1] // p, latents.shape[2] // p
        if max(h, w) > self.side:
            raise ValueError(
                f"latents of {h} x {w} patches exceed pos_embed_max_size={self.side}: "
                "ask for smaller images"
            )
        top, left = (self.side - h) // 2, (self.side - w) // 2
        grid = self.pos_embed[...].reshape(self.side, self.side, -1)
        grid = grid[top : top + h, left : left + w].reshape(1, h * w, -1)
        return tokens + grid.astype(tokens.dtype)


class MMDiT(nnx.Module):
    def __init__(
        self,
        config: MMDiTConfig,
        *,
        dtype: Any = jnp.float32,
        remat: bool = False,
        unroll: bool = False,
        attention: str = "xla",
        gather: layers.Gather | None = None,
        rngs: nnx.Rngs,
    ):
        """`attention`: see layers.attention."""
        self.config, self.remat, self.unroll, self.gather = config, remat, unroll, gather
        make = Maker(config, dtype, attention, rngs)
        self.pos_embed = PatchEmbed(make)
        self.time_text_embed = TimeTextEmbed(make)
        self.context_embedder = make.linear(config.joint_attention_dim, config.width)
        blocks: dict[str, Any] = {
            f"{start}:{end}": layers.stack(
                end - start,
                lambda r, d=dual, e=last: Block(  # type: ignore[misc]
                    d, e, Maker(config, dtype, attention, r)
                ),
                rngs,
            )
            for start, end, dual, last in config.segments()
        }
        self.transformer_blocks = nnx.Dict(blocks)
        self.norm_out = AdaNorm(2, make)
        self.proj_out = make.linear(config.width, config.patch_size**2 * config.out_channels)

    def __call__(
        self, latents: jax.Array, timestep: jax.Array, tokens: jax.Array, pooled: jax.Array
    ) -> jax.Array:
        """The velocity field.

        Args:
          latents: [B, H, W, C], H and W multiples of the patch size.
          timestep: [B], 1000 x sigma.
          tokens: [B, L, E] text states; pooled: [B, V].
        Returns:
          velocity [B, H, W, C] in the compute dtype.
        """
        p = self.config.patch_size
        if latents.shape[1] % p or latents.shape[2] % p:
            raise ValueError(
                f"latent size {latents.shape[1]} x {latents.shape[2]} is not a multiple of"
                f" patch_size={p}: change the image size"
            )
        x, c = self.pos_embed(latents), self.context_embedder(tokens)
        temb = self.time_text_embed(timestep, pooled)
        for start, end, *_ in self.config.segments():  # NNX sorts names as strings: "23" < "5"
            x, c = layers.scan(
                self.transformer_blocks[f"{start}:{end}"],
                lambda block, carry: block(*carry, temb),
                (x, c),
                unroll=self.unroll,
                remat=self.remat,
                gather=self.gather,
            )
        scale, shift = self.norm_out(temb)
        x = self.proj_out(modulate(layer_norm(x), shift, scale))
        h = latents.shape[1] // p
        return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=h, p=p, q=p)


def sine_grid(width: int, side: int, base: int) -> jax.Array:
    """The fixed position grid [1, side^2, width] that checkpoints of the family store.

    Half the channels encode the column, half the row, each sine then cosine of the position scaled
    so that `base` patches span the same range at every grid size (diffusers' PatchEmbed).
    """
    position = jnp.arange(side, dtype=jnp.float32) / (side / base)
    freqs = 1.0 / 10_000 ** (jnp.arange(width // 4, dtype=jnp.float32) / (width / 4))
    angles = position[:, None] * freqs
    line = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    column = jnp.broadcast_to(line[None], (side, side, width // 2))
    row = jnp.broadcast_to(line[:, None], (side, side, width // 2))
    return jnp.concatenate([column, row], axis=-1).reshape(1, side * side, width)
