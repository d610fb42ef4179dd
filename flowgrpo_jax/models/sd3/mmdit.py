"""MMDiT: the transformer of Stable Diffusion 3 and 3.5, two streams that attend to each other.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers" (arXiv 2403.03206), figure 2, and
diffusers' `SD3Transformer2DModel`, whose config fields and parameter names are kept. Channels
come last: latents are [B, H, W, C].

Equal neighbours among the blocks are stacked into segments (SD3.5-medium: dual 0:13, joint 13:23,
last 23:24), so the compiler sees three blocks instead of twenty-four.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from flowgrpo_jax.models import layers
from flowgrpo_jax.models.attention import PLAIN
from flowgrpo_jax.models.products import Product, exact
from flowgrpo_jax.models.sd3.blocks import (
    AdaNorm,
    Block,
    Maker,
    MMDiTConfig,
    TimeTextEmbed,
    layer_norm,
    modulate,
)
from flowgrpo_jax.models.streams import Kernel


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
    """The velocity of a latent, given its noise level and a text. Parameters are float32 or of the
    checkpoint's type; `dtype` is that of the computation."""

    def __init__(
        self,
        config: MMDiTConfig,
        *,
        dtype: Any = jnp.float32,
        remat: bool = False,
        unroll: bool = False,
        attention: Kernel = PLAIN,
        product: Product = exact,
        gather: layers.Gather | None = None,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          remat: recompute a block's activations in the backward pass.
          unroll: lay the blocks of a segment out one after another.
          attention, product: functions of models.attention and models.products.
          gather: applied to a block's parameters before it runs, by their paths (`layers.scan`).
        """
        self.config, self.remat, self.unroll, self.gather = config, remat, unroll, gather
        make = Maker(config, dtype, attention, product, rngs)
        self.pos_embed = PatchEmbed(make)
        self.time_text_embed = TimeTextEmbed(make)
        self.context_embedder = make.linear(config.joint_attention_dim, config.width)
        blocks: dict[str, Any] = {
            f"{start}:{end}": layers.stack(
                end - start,
                lambda r, d=dual, e=last: Block(  # type: ignore[misc]
                    d, e, Maker(config, dtype, attention, product, r)
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
