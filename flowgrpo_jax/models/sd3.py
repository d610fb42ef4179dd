"""Stable Diffusion 3 and 3.5 as plain functions and flat parameter dicts.

`load` reads a directory in diffusers layout and returns an `SD3`: pure functions, the frozen
weights they take, and the shapes of the trainable adapter. `describe` makes the same from an
architecture alone, with shapes in place of weights. Nothing outside `models/` knows about Flax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowgrpo_jax.models import architecture, convert, layers, lora
from flowgrpo_jax.models.architecture import PUBLISHED, Architecture
from flowgrpo_jax.models.directories import resolve
from flowgrpo_jax.models.layers import Params
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.mmdit import MMDiT
from flowgrpo_jax.models.text import CLIPText, T5Encoder, encode_prompt
from flowgrpo_jax.models.tokenizers import Tokenizers, require_t5
from flowgrpo_jax.models.vae import VAE, to_pictures
from flowgrpo_jax.types import Conditioning, Pictures

CONSTANTS = ("pos_embed/pos_embed",)  # stored with the weights, never trained
FEW_BLOCKS = 8  # so many are compiled one by one: then none copies its weights out of a stack
TEXTS = 64  # prompts that are encoded at once
TEXT: dict[str, Any] = {
    "text_encoder": CLIPText,
    "text_encoder_2": CLIPText,
    "text_encoder_3": T5Encoder,
}


@dataclass(frozen=True)
class SD3:
    """A model. `params` is frozen: {"transformer", "vae"}, each {path: array}, or {path:
    ShapeDtypeStruct} where it is only described. The text encoders are read when they are needed.

    velocity(lora, base, latents [B, H, W, C] f32, sigma [B], text Conditioning of B rows)
      -> f32 [B, H, W, C]; `lora` is what is trained: an adapter, or f32 weights that take the place
      of the transformer's own (full fine-tuning)
    decode(vae, latents [B, H, W, C]) -> Pictures uint8 [B, 8H, 8W, 3]
    encode_text(text, ids) -> Conditioning of P prompts
    latent_shape(height, width) -> latent [H, W, C] of an image of so many pixels
    """

    params: dict[str, Params]
    velocity: Callable[..., jax.Array]
    decode: Callable[[Params, jax.Array], Pictures]
    encode_text: Callable[[dict[str, Params], Any], Conditioning]
    latent_shape: Callable[[int, int], tuple[int, int, int]]
    trained_shapes: Params
    lora_spec: LoRASpec
    shift: float
    heads: int  # of the transformer
    default_size: int
    text_shapes: dict[str, Params]  # {"text_encoder", ...} -> {path: ShapeDtypeStruct}
    read_text: Callable[[], dict[str, Params]] | None = None  # their weights, from then on kept
    tokenizers: Tokenizers | None = None
    directory: Path = Path()
    name: str = ""  # what the user calls it; "" of one that is only described

    @property
    def base(self) -> Params:
        return self.params["transformer"]

    def init_trained(self, key: jax.Array) -> Params:
        """Initialise what is trained: an adapter that changes nothing, or all weights in f32."""
        if self.lora_spec.rank:
            return lora.init(key, self.trained_shapes)
        return {
            path: jnp.array(self.base[path], x.dtype) for path, x in self.trained_shapes.items()
        }

    def reference(self, trained: Params) -> Params:
        """Return the policy before training, which does not depend on the values in `trained`."""
        return lora.reference(trained) if self.lora_spec.rank else {}

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode P prompts to Conditioning of P rows, in equal parts if there are many of them.

        T5's activations are large, which limits how many prompts are encoded at once.
        """
        if self.read_text is None or self.tokenizers is None:
            raise ValueError("this model is only described: `load` it to encode prompts")
        text = self.read_text()
        size = min(len(prompts), TEXTS)
        padded = prompts + prompts[-1:] * (-len(prompts) % size)
        parts = [
            self.encode_text(text, self.tokenizers(padded[i : i + size]))
            for i in range(0, len(padded), size)
        ]
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[: len(prompts)], *parts)


def find_architecture(model: str | Path, *, t5: bool = True) -> Architecture:
    """Return the architecture of a path, name or hub id; published ones need no download."""
    parts = PUBLISHED.get(str(model)) or architecture.read(resolve(model, t5=t5), t5=t5)
    return parts if t5 else replace(parts, text_encoder_3=None)


def load(
    model: str | Path,
    *,
    t5: bool = True,
    t5_length: int = 256,
    place: convert.Place | None = None,
    texts_alone: bool = False,
    name: str = "",
    **settings: Any,
) -> SD3:
    """Load a model of the SD3 family.

    Args:
      model: a directory in diffusers layout, "shapes", "signs" or a hub id.
      t5: false leaves the largest text encoder out, as diffusers' `text_encoder_3=None`: zeros
        [P, t5_length, E] stand for its states. So does a directory that lacks it.
      t5_length: T5 tokens of a prompt (the paper: 128; diffusers: 256).
      place: sharding of each frozen parameter, given component/path and its shape.
      texts_alone: load no weights but those of the text encoders, for callers that only encode
        prompts; `params` then holds shapes.
      name: what messages call the model, where `model` is the directory of it.
      settings: `describe` takes the rest.
    Raises:
      FileNotFoundError: a missing directory or file, by name.
      ValueError: weights that do not fit their config, all listed.
    """
    directory = resolve(model, t5=t5)
    parts = architecture.read(directory, t5=t5)
    t5 = parts.text_encoder_3 is not None
    if t5:
        require_t5(directory)
    described = describe(parts, t5_length=t5_length, **settings)

    def read(name: str, shapes: Params) -> Params:
        return convert.load(
            directory / name,
            shapes,
            dtype=next(iter(shapes.values())).dtype,
            patch_size=parts.transformer.patch_size,
            **_stored(name),
            place=place and (lambda path, shape: place(f"{name}/{path}", shape)),
        )

    def read_all(components: dict[str, Params]) -> dict[str, Params]:
        return {name: read(name, shapes) for name, shapes in components.items()}

    tokenizers = Tokenizers.load(directory, t5_length, t5=t5)
    tokenizers.check(parts.text_encoder, parts.text_encoder_2, parts.text_encoder_3, directory)
    needed = described.text_shapes if texts_alone else described.params | described.text_shapes
    _check_files(directory, needed, parts.transformer.patch_size)
    return replace(
        described,
        params=described.params if texts_alone else read_all(described.params),
        read_text=cache(lambda: read_all(described.text_shapes)),
        tokenizers=tokenizers,
        directory=directory,
        name=name or str(model),
    )


def _stored(component: str) -> dict[str, Any]:
    """Return the options `ignore` and `tied` of `convert` for a component's files."""
    kind = TEXT.get(component)
    return {"ignore": getattr(kind, "ignored", ()), "tied": getattr(kind, "tied", {})}


def _check_files(directory: Path, components: dict[str, Params], patch_size: int) -> None:
    """Raise one error that lists all faults of the components' files, before any file is read.

    Without this check a fault of the text encoders would show up late, for they are read last.
    """
    problems: list[Exception] = []
    for name, shapes in components.items():
        try:
            convert.fit(directory / name, shapes, patch_size=patch_size, **_stored(name))
        except (FileNotFoundError, ValueError) as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))


@lru_cache(maxsize=16)  # a second model of the same settings has the same functions, so that the
# programs that were traced for the first serve it too
def describe(
    parts: Architecture,
    *,
    lora_spec: LoRASpec | None = None,
    dtype: Any = jnp.float32,
    t5_length: int = 256,
    remat: bool = False,
    attention: str = "xla",
    gather: layers.Gather | None = None,
) -> SD3:
    """The functions of a model, and the shapes of what they take; nothing is allocated.

    Args:
      lora_spec: the adapter to make room for; a small one, that any model has room for, without it.
      dtype: compute and storage dtype of transformer and text encoders; the VAE stays f32.
      t5_length: T5 tokens of a prompt.
      remat: recompute block activations in the backward pass.
      attention: the implementation of the transformer's, see layers.attention.
      gather: applied to the parameters of the transformer before their use, by
        sharding.gather_weights.
    """
    spec = lora_spec or LoRASpec(rank=1, alpha=1.0, targets=("attn.to_q",))
    velocity, base, trained = _transformer(parts, spec, dtype, remat, attention, gather)
    vae, vae_shapes = _part(lambda rngs: VAE(parts.vae, rngs=rngs), jnp.float32)
    encode_text, text_shapes = _encoders(parts, dtype, t5_length)
    return SD3(
        params={"transformer": base, "vae": vae_shapes},
        velocity=velocity,
        decode=lambda params, z: to_pictures(vae(params, z, method="decode")),
        encode_text=encode_text,
        latent_shape=parts.latent_shape,
        # What is trained is f32, whatever the model computes in.
        trained_shapes=_as_dtype(trained, jnp.float32),
        lora_spec=spec,
        shift=parts.shift,
        heads=parts.transformer.num_attention_heads,
        default_size=parts.transformer.sample_size * parts.vae.downsampling,
        text_shapes=text_shapes,
    )


def _as_dtype(shapes: Params, dtype: Any) -> Params:
    return {path: jax.ShapeDtypeStruct(x.shape, dtype) for path, x in shapes.items()}


def _part(create: Callable[[nnx.Rngs], nnx.Module], dtype: Any) -> tuple[Any, Params]:
    """A module's function and the shapes of its parameters, stored as `dtype`."""
    apply, shapes = layers.abstract(create)
    return apply, _as_dtype(shapes, dtype)


def _transformer(
    parts: Architecture,
    spec: LoRASpec,
    dtype: Any,
    remat: bool,
    attention: str,
    gather: layers.Gather | None,
) -> tuple[Callable[..., jax.Array], Params, Params]:
    """The velocity, and the shapes of the frozen and of the trained weights."""

    def adapted(rngs: nnx.Rngs) -> MMDiT:
        config = parts.transformer
        module = MMDiT(
            config,
            dtype=dtype,
            remat=remat,
            # Laid out, XLA would keep what is to be recomputed, and the weights that are fetched.
            unroll=config.num_layers <= FEW_BLOCKS and not remat and gather is None,
            attention=attention,
            gather=gather,
            rngs=rngs,
        )
        if spec.rank:
            lora.add(module, spec)
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
        v = mmdit(params, x, 1000 * sigma, text.tokens.astype(dtype), text.pooled.astype(dtype))
        return v.astype(jnp.float32)

    return velocity, base, trained


def _encoders(
    parts: Architecture, dtype: Any, t5_length: int
) -> tuple[Callable[..., Conditioning], dict[str, Params]]:
    """Return the function from token ids to Conditioning, and the shapes of its weights."""

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
        return Conditioning(tokens=tokens, pooled=pooled)

    return encode_text, {name: shapes for name, (_, shapes) in text.items()}
