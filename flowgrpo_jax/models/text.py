"""Text encoders: CLIP's text tower and the encoder of T5.

Follows transformers' `CLIPTextModelWithProjection` and `T5EncoderModel` as diffusers' pipelines
call them: without a padding mask, so that padding tokens are read like words. Each model is a plain
function of token ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flowgrpo_jax.models.layers import Linear, scan, stack

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
}
LEGACY_EOS = 2  # configs written before transformers' PR 24773 hold this wrong id


@dataclass(frozen=True)
class CLIPLayers:
    """The sizes of the transformer layers that both towers of a CLIP model have."""

    causal: ClassVar[bool]
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, known are {sorted(ACTIVATIONS)}")


@dataclass(frozen=True)
class CLIPConfig(CLIPLayers):
    """Fields of a transformers `text_encoder/config.json` (defaults: CLIP-L of SD3)."""

    causal: ClassVar[bool] = True
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = LEGACY_EOS


@dataclass(frozen=True)
class T5Config:
    """Fields of a transformers `text_encoder_3/config.json` (defaults: T5 v1.1 XXL)."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    feed_forward_proj: str = "gated-gelu"
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(
                f"feed_forward_proj is {self.feed_forward_proj!r}; only T5 v1.1 ('gated-gelu'), "
                "the encoder of SD3, is implemented"
            )


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)


class CLIPAttention(nnx.Module):
    """Multi-head self-attention, causal in the text towers."""

    def __init__(self, config: CLIPLayers, dtype: Any, rngs: nnx.Rngs):
        self.heads, self.causal = config.num_attention_heads, config.causal
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (split_heads(f(x), self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.reshape(x.shape))


class CLIPMLP(nnx.Module):
    def __init__(self, config: CLIPLayers, dtype: Any, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(width, inner, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(inner, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.act(self.fc1(x)))


def clip_norm(config: CLIPLayers, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    epsilon, width = config.layer_norm_eps, config.hidden_size
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)


class CLIPLayer(nnx.Module):
    def __init__(self, config: CLIPLayers, dtype: Any, rngs: nnx.Rngs):
        self.layer_norm1 = clip_norm(config, dtype, rngs)
        self.self_attn = CLIPAttention(config, dtype, rngs)
        self.layer_norm2 = clip_norm(config, dtype, rngs)
        self.mlp = CLIPMLP(config, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTower(nnx.Module):
    """Ids [B, L] to the states before and after the last layer, which is a stack of its own."""

    def __init__(self, config: CLIPConfig, dtype: Any, rngs: nnx.Rngs):
        def embed(n: int) -> nnx.Embed:
            return nnx.Embed(n, config.hidden_size, dtype=dtype, rngs=rngs)

        def layers(start: int, stop: int) -> nnx.Module:
            return stack(stop - start, lambda r: CLIPLayer(config, dtype, r), rngs)

        tables = (embed(config.vocab_size), embed(config.max_position_embeddings))
        names = ("token_embedding", "position_embedding")
        self.embeddings = nnx.Dict(dict(zip(names, tables, strict=True)))
        n = config.num_hidden_layers
        bounds = [(0, n - 1), (n - 1, n)] if n > 1 else [(0, 1)]
        segments = {f"{start}:{stop}": layers(start, stop) for start, stop in bounds}
        self.encoder = nnx.Dict({"layers": nnx.Dict(segments)})
        self.final_layer_norm = clip_norm(config, dtype, rngs)

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.embeddings["token_embedding"](ids)
        x = x + self.embeddings["position_embedding"](jnp.arange(ids.shape[1]))
        *first, last = self.encoder["layers"].values()
        for layers in first:
            x = scan(layers, lambda layer, x: layer(x), x)
        return x, self.final_layer_norm(scan(last, lambda layer, x: layer(x), x))


class CLIPText(nnx.Module):
    """`CLIPTextModelWithProjection`."""

    ignored: ClassVar[tuple[str, ...]] = (
        "text_model.embeddings.position_ids",
    )  # a constant in older files

    def __init__(self, config: CLIPConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        sizes = (config.hidden_size, config.projection_dim)
        self.text_model = CLIPTower(config, dtype, rngs)
        self.text_projection = Linear(*sizes, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ids [B, L] -> (state before the last layer [B, L, D], not normalised; pooled [B, V])."""
        limit = self.config.max_position_embeddings
        if ids.shape[1] > limit:
            raise ValueError(f"{ids.shape[1]} tokens, but max_position_embeddings is {limit}")
        hidden, final = self.text_model(ids)
        # Pooled is the state at the first end token; the legacy rule looks for the highest id.
        eos = self.config.eos_token_id
        position = jnp.argmax(ids if eos == LEGACY_EOS else ids == eos, axis=-1)
        pooled = jnp.take_along_axis(final, position[:, None, None], axis=1)[:, 0]
        return hidden, self.text_projection(pooled)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32: no mean, no bias."""

    def __init__(self, width: int, epsilon: float, dtype: Any):
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones((width,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...]).astype(self.dtype)


class T5Attention(nnx.Module):
    """Bidirectional attention with a relative position bias and no 1/sqrt(head_dim)."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q, self.k, self.v = (
            Linear(width, inner, bias=False, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.o = Linear(inner, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        q, k, v = (split_heads(f(x), self.heads) for f in (self.q, self.k, self.v))
        y = jax.nn.dot_product_attention(q, k, v, bias=bias.astype(q.dtype), scale=1.0)
        return self.o(y.reshape(*x.shape[:2], -1))


class GatedMLP(nnx.Module):
    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        width, inner = config.d_model, config.d_ff
        self.wi_0 = Linear(width, inner, bias=False, dtype=dtype, rngs=rngs)
        self.wi_1 = Linear(width, inner, bias=False, dtype=dtype, rngs=rngs)
        self.wo = Linear(inner, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class T5Block(nnx.Module):
    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        def normed(name: str, module: nnx.Module) -> nnx.Dict:
            norm = RMSNorm(config.d_model, config.layer_norm_epsilon, dtype)
            return nnx.Dict({"layer_norm": norm, name: module})

        attend = normed("SelfAttention", T5Attention(config, dtype, rngs))
        feed = normed("DenseReluDense", GatedMLP(config, dtype, rngs))
        self.layer = nnx.List([attend, feed])

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        attend, feed = self.layer
        x = x + attend["SelfAttention"](attend["layer_norm"](x), bias)
        return x + feed["DenseReluDense"](feed["layer_norm"](x))


class T5Encoder(nnx.Module):
    """`T5EncoderModel`. The bias table belongs to block 0 and is read by all blocks."""

    # The table is stored under either name or under both, depending on who saved it.
    tied: ClassVar[dict[str, str]] = {"encoder.embed_tokens.weight": "shared.weight"}
    ignored: ClassVar[tuple[str, ...]] = tuple(tied)

    def __init__(self, config: T5Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        n, width = config.num_layers, config.d_model
        self.shared = nnx.Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        table = nnx.Embed(config.relative_attention_num_buckets, config.num_heads, rngs=rngs)
        bias = nnx.Dict({"SelfAttention": nnx.Dict({"relative_attention_bias": table})})
        blocks = {
            "0": nnx.Dict({"layer": nnx.List([bias])}),
            f"0:{n}": stack(n, lambda r: T5Block(config, dtype, r), rngs),
        }
        norm = RMSNorm(width, config.layer_norm_epsilon, dtype)
        self.encoder = nnx.Dict({"block": nnx.Dict(blocks), "final_layer_norm": norm})

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Ids [B, L] -> normalised states [B, L, D]."""
        blocks: Any = self.encoder["block"]
        table = blocks["0"]["layer"][0]["SelfAttention"]["relative_attention_bias"]
        bias = table(relative_buckets(ids.shape[1], self.config)).transpose(2, 0, 1)[None]
        stacked = blocks[f"0:{self.config.num_layers}"]
        x = scan(stacked, lambda block, x: block(x, bias), self.shared(ids))
        return self.encoder["final_layer_norm"](x)


def relative_buckets(length: int, config: T5Config) -> np.ndarray:
    """Bucket [query, key] of the distance key - query, half of the buckets for each sign.

    The nearer half of a sign's buckets holds one distance each, the others grow logarithmically
    up to `relative_attention_max_distance`. In numpy, at trace time, in float32 as the reference:
    distances that fall on a border must round the same way.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    per_sign = config.relative_attention_num_buckets // 2
    exact, distance = per_sign // 2, np.abs(offset)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    span = np.float32(math.log(config.relative_attention_max_distance / exact))
    far = exact + (np.log(ratio) / span * np.float32(per_sign - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, per_sign - 1))
    return bucket + per_sign * (offset > 0)
