"""ImageReward's model: BLIP's image encoder, a BERT that attends to it, and a small head.

Parameters have the names of the published `ImageReward.pt` (blip.visual_encoder, blip.text_encoder,
mlp), which are those of salesforce/BLIP: a timm ViT and a BERT with cross-attention in every layer.

Source: Xu et al. 2023, ImageReward (arXiv 2304.05977); Li et al. 2022, BLIP (arXiv 2201.12086).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowgrpo_jax.models.layers import Linear, scan, stack
from flowgrpo_jax.models.text import split_heads
from flowgrpo_jax.models.towers.aesthetic_head import Head
from flowgrpo_jax.models.weight_files import Tensors

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score, published with the weights


@dataclass(frozen=True)
class BLIPConfig:
    """Fields of `med_config.json`, and of the image encoder (defaults: ImageReward-v1.0)."""

    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16

    def __post_init__(self):
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}, ImageReward's BERT uses 'gelu'")

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> BLIPConfig:
        """Read the fields of `med_config.json` that are used here; the others are ignored.

        `vision_*` fields are ours: the published file says nothing of the image encoder.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in raw.items() if k in known})


def norm(width: int, epsilon: float, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


# ------------------------------------------------------------------------------ the image encoder


class FusedAttention(nnx.Module):
    """timm's self-attention: one projection for q, k and v."""

    def __init__(self, width: int, heads: int, dtype: Any, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (split_heads(y, self.heads) for y in jnp.split(self.qkv(x), 3, axis=-1))
        return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class VisionBlock(nnx.Module):
    def __init__(self, config: BLIPConfig, dtype: Any, rngs: nnx.Rngs):
        width = config.vision_width
        self.norm1 = norm(width, 1e-6, dtype, rngs)
        self.attn = FusedAttention(width, config.vision_heads, dtype, rngs)
        self.norm2 = norm(width, 1e-6, dtype, rngs)
        linears = [(width, 4 * width), (4 * width, width)]
        fc1, fc2 = (Linear(*sizes, dtype=dtype, rngs=rngs) for sizes in linears)
        self.mlp = nnx.Dict({"fc1": fc1, "fc2": fc2})

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x))))


class ImageEncoder(nnx.Module):
    """A ViT that returns the states of the class token and of all patches."""

    def __init__(self, config: BLIPConfig, dtype: Any, rngs: nnx.Rngs):
        width, patch = config.vision_width, (config.patch_size, config.patch_size)
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.pos_embed = nnx.Param(jnp.zeros((1, tokens, width)))
        proj = nnx.Conv(3, width, patch, strides=patch, padding=0, dtype=dtype, rngs=rngs)
        self.patch_embed = nnx.Dict({"proj": proj})
        n = config.vision_layers
        self.blocks = nnx.Dict({f"0:{n}": stack(n, lambda r: VisionBlock(config, dtype, r), rngs)})
        self.norm = norm(width, 1e-6, dtype, rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, H, W, 3] -> [B, 1 + patches, D]."""
        x = self.patch_embed["proj"](pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = self.cls_token[...].astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2])), x], axis=1)
        x = x + self.pos_embed[...].astype(x.dtype)
        (blocks,) = self.blocks.values()
        return self.norm(scan(blocks, lambda block, x: block(x), x))


# ------------------------------------------------------------------------------- the text encoder


class Attention(nnx.Module):
    """BERT's attention with its residual and its norm after it; keys from `source`."""

    def __init__(self, config: BLIPConfig, source: int, dtype: Any, rngs: nnx.Rngs):
        width, self.heads = config.hidden_size, config.num_attention_heads
        inner = {
            "query": Linear(width, width, dtype=dtype, rngs=rngs),
            "key": Linear(source, width, dtype=dtype, rngs=rngs),
            "value": Linear(source, width, dtype=dtype, rngs=rngs),
        }
        self.self = nnx.Dict(inner)  # the checkpoint's name of it
        self.output = after(width, config, dtype, rngs)

    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array | None) -> jax.Array:
        project = self.self
        q = split_heads(project["query"](x), self.heads)
        k, v = (split_heads(project[name](source), self.heads) for name in ("key", "value"))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)
        return self.output["LayerNorm"](x + self.output["dense"](y))


def after(n_in: int, config: BLIPConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.Dict:
    width = config.hidden_size
    dense = Linear(n_in, width, dtype=dtype, rngs=rngs)
    return nnx.Dict({"dense": dense, "LayerNorm": norm(width, config.layer_norm_eps, dtype, rngs)})


class TextLayer(nnx.Module):
    """The text looks at itself, then at the image, then through an MLP; norms come last."""

    def __init__(self, config: BLIPConfig, dtype: Any, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = Attention(config, width, dtype, rngs)
        self.crossattention = Attention(config, config.vision_width, dtype, rngs)
        self.intermediate = nnx.Dict({"dense": Linear(width, inner, dtype=dtype, rngs=rngs)})
        self.output = after(inner, config, dtype, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        x = self.crossattention(self.attention(x, x, mask), image, None)
        y = self.output["dense"](gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + y)


class TextEncoder(nnx.Module):
    def __init__(self, config: BLIPConfig, dtype: Any, rngs: nnx.Rngs):
        width = config.hidden_size

        def embed(n: int) -> nnx.Embed:
            return nnx.Embed(n, width, dtype=dtype, rngs=rngs)

        self.embeddings = nnx.Dict(
            {
                "word_embeddings": embed(config.vocab_size),
                "position_embeddings": embed(config.max_position_embeddings),
                "LayerNorm": norm(width, config.layer_norm_eps, dtype, rngs),
            }
        )
        n = config.num_hidden_layers
        layers = stack(n, lambda r: TextLayer(config, dtype, r), rngs)
        self.encoder = nnx.Dict({"layer": nnx.Dict({f"0:{n}": layers})})

    def __call__(self, ids: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        """Ids [B, L], mask bool [B, L], image states [B, S, D'] -> [B, L, D]."""
        x = self.embeddings["word_embeddings"](ids)
        x = x + self.embeddings["position_embeddings"](jnp.arange(ids.shape[1]))
        keys = mask[:, None, None, :]
        (layers,) = self.encoder["layer"].values()
        x = self.embeddings["LayerNorm"](x)
        return scan(layers, lambda layer, x: layer(x, keys, image), x)


class ImageReward(nnx.Module):
    """ImageReward-v1.0. `parts` are the checkpoint's weights that a score needs."""

    parts = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
    ignored = ("blip.text_encoder.embeddings.position_ids",)
    full = ("mlp/",)  # float32 in any dtype, as in the original

    def __init__(self, config: BLIPConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        encoders = {
            "visual_encoder": ImageEncoder(config, dtype, rngs),
            "text_encoder": TextEncoder(config, dtype, rngs),
        }
        self.blip = nnx.Dict(encoders)
        self.mlp = Head(config.hidden_size, rngs=rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array, pixels: jax.Array) -> jax.Array:
        """Ids i32 and mask bool [B, L], normalised pixels [B, H, W, 3] -> scores f32 [B]."""
        image = self.blip["visual_encoder"](pixels)
        states = self.blip["text_encoder"](ids, mask, image)
        return (self.mlp(states[:, 0].astype(jnp.float32)) - MEAN) / STD

    @classmethod
    def needed(cls, tensors: Tensors) -> Tensors:
        """Drop BLIP's projections for its pretraining losses, which are unused here."""
        return {name: x for name, x in tensors.items() if name.startswith(cls.parts)}
