"""The functions of an SD3 model, made from its architecture, and the shapes of what they take."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowgrpo_jax import sharding
from flowgrpo_jax.models import Model, layers, lora, quantised
from flowgrpo_jax.models.attention import PLAIN
from flowgrpo_jax.models.layers import Params
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.products import Product, exact
from flowgrpo_jax.models.sd3.architecture import Architecture
from flowgrpo_jax.models.sd3.mmdit import MMDiT
from flowgrpo_jax.models.sd3.tokenizers import CLIP_LENGTH
from flowgrpo_jax.models.streams import Kernel
from flowgrpo_jax.models.text import CLIPText, T5Encoder
from flowgrpo_jax.models.vae import VAE, to_levels, to_pictures
from flowgrpo_jax.sampling import sde
from flowgrpo_jax.types import Conditioning, Pictures

CONSTANTS = ("pos_embed/pos_embed",)  # stored with the weights, never trained
BASE_DTYPES = (quantised.INT8,)
FEW_BLOCKS = 8  # so many are compiled one by one: then none copies its weights out of a stack
TEXT: dict[str, Any] = {
    "text_encoder": CLIPText,
    "text_encoder_2": CLIPText,
    "text_encoder_3": T5Encoder,
}
RULES = (
    # linears of whole heads or hidden units a device, and those that sum over them
    *sharding.cut_outputs("to_[qkv]|add_[qkv]_proj|[qkv]_proj|net/0/proj|fc1|wi_[01]|[qkv]"),
    *sharding.cut_inputs("to_out/0|to_add_out|out_proj|net/2|fc2|wo|o"),
    # modulations, embeddings and the projections at both ends
    *sharding.cut_storage(
        "linear|linear_[12]|context_embedder|pos_embed/proj|proj_out|text_projection"
    ),
    *sharding.cut_table("token_embedding|shared"),
    *sharding.whole("(position_embedding|relative_attention_bias)/embedding", 2),
    *sharding.whole("pos_embed/pos_embed", 3),
    *sharding.whole("(norm_(added_)?[qk]|layer_norm[12]?|final_layer_norm)/(scale|bias)", 1),
)


@lru_cache(maxsize=16)  # a second model of the same settings has the same functions, so that the
# programs that were traced for the first serve it too
def describe(
    parts: Architecture,
    *,
    lora_spec: LoRASpec | None = None,
    dtype: Any = jnp.float32,
    base_dtype: str = "",
    t5_length: int = 256,
    remat: bool = False,
    attention: Kernel = PLAIN,
    product: Product = exact,
    gather: layers.Gather | None = None,
) -> Model:
    """The functions of a model, and the shapes of what they take; nothing is allocated.

    Args:
      lora_spec: the adapter to make room for; a small one, that any model has room for, without it.
      dtype: compute and storage dtype of transformer and text encoders; the VAE stays f32.
      base_dtype: "int8" for the kernels of the transformer's blocks in 8 bits, or "".
      t5_length: T5 tokens of a prompt.
      remat: recompute block activations in the backward pass.
      attention, product: the transformer's attention, and the product of its linears, of
        models.attention and models.products.
      gather: applied to the parameters of the transformer before their use, by
        sharding.gather_weights.

    Raises ValueError for a base_dtype that is unknown, or without an adapter.
    """
    spec = lora_spec or LoRASpec(rank=1, alpha=1.0, targets=("attn.to_q",))
    quantised.setting(base_dtype, spec.rank, BASE_DTYPES)
    velocity, base, trained = _transformer(
        parts, spec, base_dtype, dtype, remat, gather, attention=attention, product=product
    )
    decode, levels, to_latents, vae_shapes = _autoencoder(parts)
    encode_text, text_shapes = _encoders(parts, dtype, t5_length)
    lengths = [min(parts.text_encoder.max_position_embeddings, CLIP_LENGTH)] * 2
    lengths += [t5_length] if parts.text_encoder_3 else []

    return Model(
        params={"transformer": base, "vae": vae_shapes},
        velocity=velocity,
        decode=decode,
        to_latents=to_latents,
        levels=levels,
        encode_text=encode_text,
        token_shapes=lambda n: tuple(jax.ShapeDtypeStruct((n, k), jnp.int32) for k in lengths),
        sigmas=lambda steps, height, width: sde.sigma_schedule(steps, parts.shift),
        latent_shape=parts.latent_shape,
        # What is trained is f32, whatever the model computes in.
        trained_shapes=_as_dtype(trained, jnp.float32),
        text_shapes=text_shapes,
        lora_spec=spec,
        rules=RULES,
        heads=parts.transformer.num_attention_heads,
        shift=lambda height, width: parts.shift,
        default_size=parts.transformer.sample_size * parts.vae.downsampling,
    )


def _as_dtype(shapes: Params, dtype: Any) -> Params:
    """The shapes in a dtype, but for what is quantised."""
    kept = quantised.paths(shapes)
    return {
        path: x if path in kept else jax.ShapeDtypeStruct(x.shape, dtype)
        for path, x in shapes.items()
    }


def _part(create: Callable[[nnx.Rngs], nnx.Module], dtype: Any) -> tuple[Any, Params]:
    """A module's function and the shapes of its parameters, stored as `dtype`."""
    apply, shapes = layers.abstract(create)
    return apply, _as_dtype(shapes, dtype)


def _transformer(
    parts: Architecture,
    spec: LoRASpec,
    base_dtype: str,
    dtype: Any,
    remat: bool,
    gather: layers.Gather | None,
    **settings: Any,
) -> tuple[Callable[..., jax.Array], Params, Params]:
    """The velocity, and the shapes of the frozen and of the trained weights.

    Args:
      settings: the remaining arguments of MMDiT.
    """

    def adapted(rngs: nnx.Rngs) -> MMDiT:
        config = parts.transformer
        module = MMDiT(
            config,
            dtype=dtype,
            remat=remat,
            # Laid out, XLA would keep what is to be recomputed, and the weights that are fetched.
            unroll=config.num_layers <= FEW_BLOCKS and not remat and gather is None,
            gather=gather,
            rngs=rngs,
            **settings,
        )
        if spec.rank:
            lora.add(module, spec)
        if base_dtype:
            layers.quantise_stacks(module)
        return module

    mmdit, shapes = _part(adapted, dtype)
    adapter, base = lora.split(shapes)
    trained = adapter if spec.rank else {k: x for k, x in base.items() if k not in CONSTANTS}

    def velocity(lora, base, latents, sigma, text):
        x = latents.astype(dtype)
        if not spec.rank:  # as the frozen weights are: bit for bit the same policy before training
            lora = {path: w.astype(dtype) for path, w in lora.items()}
        params = {**base, **lora}
        if gather:  # blocks do it themselves, one by one
            params = {k: w if ":" in k else gather(k, w) for k, w in params.items()}
        tokens, pooled = text["tokens"].astype(dtype), text["pooled"].astype(dtype)
        return mmdit(params, x, 1000 * sigma, tokens, pooled).astype(jnp.float32)

    return velocity, base, trained


def _autoencoder(
    parts: Architecture,
) -> tuple[Callable[..., Pictures], Callable[..., jax.Array], Callable[..., jax.Array], Params]:
    """Return `decode`, `levels` and `to_latents` of a Model, and the shapes of their weights."""
    vae, shapes = _part(lambda rngs: VAE(parts.vae, rngs=rngs), jnp.float32)

    def to_latents(params: Params, pixels: jax.Array) -> jax.Array:
        mean, _ = vae(params, pixels.astype(jnp.float32) / 127.5 - 1, method="encode")
        return vae(params, mean, method="scale")

    return (
        lambda params, z: to_pictures(vae(params, z, method="decode")),
        lambda params, z: to_levels(vae(params, z, method="decode")),
        to_latents,
        shapes,
    )


def _encoders(
    parts: Architecture, dtype: Any, t5_length: int
) -> tuple[Callable[..., Conditioning], dict[str, Params]]:
    """Return the function from token ids to a conditioning, and the shapes of its weights."""

    def encoder(name: str) -> tuple[Any, Params]:
        fields = getattr(parts, name)
        return _part(lambda rngs: TEXT[name](fields, dtype=dtype, rngs=rngs), dtype)

    text = {name: encoder(name) for name in TEXT if getattr(parts, name) is not None}

    @jax.jit
    def encode_text(params: dict[str, Params], ids: Any) -> Conditioning:
        states = [apply(params[name], i) for (name, (apply, _)), i in zip(text.items(), ids)]
        clip_l, clip_g, *t5 = states
        tokens, pooled = encode_prompt(
            clip_l,
            clip_g,
            t5[0] if t5 else None,
            t5_length=t5_length,
            width=parts.transformer.joint_attention_dim,
        )
        return {"tokens": tokens, "pooled": pooled}

    return encode_text, {name: shapes for name, (_, shapes) in text.items()}


def encode_prompt(
    clip_l: tuple[jax.Array, jax.Array],
    clip_g: tuple[jax.Array, jax.Array],
    t5: jax.Array | None,
    *,
    t5_length: int = 256,
    width: int = 4096,
) -> tuple[jax.Array, jax.Array]:
    """Join the text states for the transformer as `StableDiffusion3Pipeline.encode_prompt` does.

    Args:
      clip_l, clip_g: the outputs of `CLIPText` of each encoder, [B, 77, D] and [B, V].
      t5: the output of `T5Encoder` [B, L, E], or None for zeros [B, t5_length, width].
    Returns:
      tokens [B, 77 + L, E], the CLIP part filled up with zeros; pooled [B, V_l + V_g].
    """
    (hidden_l, pooled_l), (hidden_g, pooled_g) = clip_l, clip_g
    clip = jnp.concatenate([hidden_l, hidden_g], axis=-1)
    if t5 is None:
        t5 = jnp.zeros((clip.shape[0], t5_length, width), clip.dtype)
    if clip.shape[-1] > t5.shape[-1]:
        raise ValueError(f"CLIP states, {clip.shape[-1]} wide, do not fit into {t5.shape[-1]}")
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
    return jnp.concatenate([clip, t5], axis=1), jnp.concatenate([pooled_l, pooled_g], axis=-1)
