"""AutoencoderKL of the SD3 family: images to latents and back. Channels last throughout.

Follows diffusers' `AutoencoderKL` (DownEncoderBlock2D / UpDecoderBlock2D, one attention in the
middle). `encode` returns the posterior's mean and log-variance, `decode` takes latents as the
transformer sees them: scaled and shifted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from flowgrpo_jax.models.convolution import conv_general_dilated
from flowgrpo_jax.models.layers import Linear
from flowgrpo_jax.types import Pictures


@dataclass(frozen=True)
class VAEConfig:
    """Fields of a diffusers `vae/config.json`."""

    known: ClassVar[dict[str, tuple[str, ...]]] = {  # the only supported values of other fields
        "act_fn": ("silu", "swish"),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    }
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    in_channels: int = 3
    out_channels: int = 3
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    scaling_factor: float = 1.5305
    shift_factor: float | None = 0.0609

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


class GroupNorm(nnx.Module):
    """Normalises groups of channels over all positions, epsilon 1e-6, statistics in f32.

    Sums over positions first, then over the channels of a group: XLA on the CPU takes three times
    as long for both at once, as `nnx.GroupNorm` has it, and then longer than for the convolution.
    """

    def __init__(self, channels: int, groups: int, dtype: Any):
        if channels % groups:
            raise ValueError(f"{channels} channels are not a multiple of norm_num_groups={groups}")
        self.groups, self.dtype = groups, dtype
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [B, H, W, C]."""
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        y = y - self._mean(y)
        y = y * jax.lax.rsqrt(self._mean(jnp.square(y)) + 1e-6)  # the two-pass variance: exact
        return (y * self.scale[...] + self.bias[...]).reshape(x.shape).astype(self.dtype)

    def _mean(self, y: jax.Array) -> jax.Array:
        """Return the mean of each channel's group: [B, S, C] -> [B, 1, C]."""
        b, _, c = y.shape
        mean = y.mean(1).reshape(b, self.groups, c // self.groups).mean(-1)
        return jnp.repeat(mean, c // self.groups, axis=-1)[:, None]


class Maker:
    """Layers with the config's dtype and groups filled in, so that the blocks read short."""

    def __init__(self, config: VAEConfig, dtype: Any, rngs: nnx.Rngs):
        self.config, self.dtype, self.rngs = config, dtype, rngs

    def conv(self, n_in: int, n_out: int, size: int = 3, stride: int = 1, padding: Any = None):
        padding = size // 2 if padding is None else padding
        kernel = (size, size)
        return nnx.Conv(
            n_in,
            n_out,
            kernel,
            strides=stride,
            padding=padding,
            dtype=self.dtype,
            param_dtype=jnp.float32,
            conv_general_dilated=conv_general_dilated,
            rngs=self.rngs,
        )

    def norm(self, channels: int):
        return GroupNorm(channels, self.config.norm_num_groups, self.dtype)

    def linear(self, n_in: int, n_out: int):
        return Linear(n_in, n_out, dtype=self.dtype, rngs=self.rngs)


class Resnet(nnx.Module):
    """Two convolutions, each after a norm and SiLU, beside a shortcut."""

    def __init__(self, n_in: int, n_out: int, make: Maker):
        self.norm1, self.conv1 = make.norm(n_in), make.conv(n_in, n_out)
        self.norm2, self.conv2 = make.norm(n_out), make.conv(n_out, n_out)
        if n_in != n_out:
            self.conv_shortcut = make.conv(n_in, n_out, size=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class Attention(nnx.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, make: Maker):
        self.group_norm = make.norm(channels)
        self.to_q, self.to_k, self.to_v = (make.linear(channels, channels) for _ in range(3))
        self.to_out = nnx.List([make.linear(channels, channels)])

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, 1, c)
        y = jax.nn.dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y).reshape(b, h, w, c)


class Middle(nnx.Module):
    """Two residual blocks around an attention, at the lowest resolution."""

    def __init__(self, channels: int, make: Maker):
        self.resnets = nnx.List([Resnet(channels, channels, make) for _ in range(2)])
        if make.config.mid_block_add_attention:
            self.attentions = nnx.List([Attention(channels, make)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsample(nnx.Module):
    """Halve height and width; the padding is below and to the right, as in diffusers."""

    def __init__(self, channels: int, make: Maker):
        self.conv = make.conv(channels, channels, stride=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Double height and width by nearest neighbours, then a convolution."""

    def __init__(self, channels: int, make: Maker):
        self.conv = make.conv(channels, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class DownBlock(nnx.Module):
    """Residual blocks of one resolution and, but for the last block, a halving of it."""

    def __init__(self, n_in: int, n_out: int, last: bool, make: Maker):
        n = make.config.layers_per_block
        self.resnets = nnx.List([Resnet(n_in if i == 0 else n_out, n_out, make) for i in range(n)])
        self.downsamplers = nnx.List([] if last else [Downsample(n_out, make)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """Residual blocks of one resolution and, but for the last block, a doubling of it."""

    def __init__(self, n_in: int, n_out: int, last: bool, make: Maker):
        n = make.config.layers_per_block + 1
        self.resnets = nnx.List([Resnet(n_in if i == 0 else n_out, n_out, make) for i in range(n)])
        self.upsamplers = nnx.List([] if last else [Upsample(n_out, make)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Images [B, H, W, 3] -> moments [B, H/8, W/8, 2C]: a block for each width of the config."""

    def __init__(self, make: Maker):
        config = make.config
        widths = config.block_out_channels
        self.conv_in = make.conv(config.in_channels, widths[0])
        self.down_blocks = nnx.List(
            [
                DownBlock(widths[max(i - 1, 0)], width, i == len(widths) - 1, make)
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = Middle(widths[-1], make)
        self.conv_norm_out = make.norm(widths[-1])
        self.conv_out = make.conv(widths[-1], 2 * config.latent_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents [B, h, w, C] -> images [B, 8h, 8w, 3]: a block for each width of the config."""

    def __init__(self, make: Maker):
        config = make.config
        widths = config.block_out_channels[::-1]
        self.conv_in = make.conv(config.latent_channels, widths[0])
        self.mid_block = Middle(widths[0], make)
        self.up_blocks = nnx.List(
            [
                UpBlock(widths[max(i - 1, 0)], width, i == len(widths) - 1, make)
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = make.norm(widths[-1])
        self.conv_out = make.conv(widths[-1], config.out_channels)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """diffusers' `AutoencoderKL`, with its config fields and parameter names."""

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        make = Maker(config, dtype, rngs)
        latent = config.latent_channels
        self.encoder, self.decoder = Encoder(make), Decoder(make)
        if config.use_quant_conv:
            self.quant_conv = make.conv(2 * latent, 2 * latent, size=1)
        if config.use_post_quant_conv:
            self.post_quant_conv = make.conv(latent, latent, size=1)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, 3] in [-1, 1] -> mean and log-variance, each [B, H/8, W/8, C].

        Both describe the unscaled latent; `scale(mean)` is what the transformer is trained on.
        """
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def scale(self, z: jax.Array) -> jax.Array:
        """Return the latent that the transformer is trained on; z is the encoder's mean."""
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, C] as the transformer sees them -> images [B, 8h, 8w, 3] in [-1, 1]."""
        z = latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z)


def to_pictures(images: jax.Array) -> Pictures:
    """Return pictures of floats [M, H, W, 3] in [-1, 1]; NaN is neither black nor any other colour,
    so that an image with a pixel that is not finite is marked."""
    return Pictures(to_uint8(images), jnp.isfinite(images).all(axis=(1, 2, 3)))


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] floats to uint8, rounded as diffusers' image processor rounds."""
    return jnp.round(to_levels(images)).astype(jnp.uint8)


def to_levels(images: jax.Array) -> jax.Array:
    """[-1, 1] floats to f32 from 0 to 255, cut there."""
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0) * 255
