"""CLIP: one text and one vision tower into a common space.

Follows transformers' `CLIPModel`, whose names the parameters have; `from_open_clip` renames the
checkpoints of open_clip (and of OpenAI) to them. The text tower is that of `text.py`.

Source: Radford et al. 2021 (arXiv 2103.00020).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flowgrpo_jax.models.layers import Linear, scan, stack
from flowgrpo_jax.models.text import CLIPConfig, CLIPLayer, CLIPLayers, CLIPText, clip_norm
from flowgrpo_jax.models.weight_files import Tensor, Tensors


@dataclass(frozen=True)
class VisionConfig(CLIPLayers):
    """Fields of the `vision_config` of a transformers CLIP (defaults: ViT-L/14)."""

    causal: ClassVar[bool] = False
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size is {self.image_size}: it must be a multiple of patch_size,"
                f" {self.patch_size}"
            )


@dataclass(frozen=True)
class DualConfig:
    text: CLIPConfig
    vision: VisionConfig

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> DualConfig:
        """Read a transformers `config.json`; fields that are not used here are ignored."""
        width = raw.get("projection_dim", 512)  # transformers' default

        def fields(kind: type, name: str) -> Any:
            # Older files have a second, authoritative record, `text_config_dict`.
            known = {f.name for f in dataclasses.fields(kind)}
            given = {**(raw.get(name) or {}), **(raw.get(f"{name}_dict") or {})}
            given = {**TRANSFORMERS[name], **given, "projection_dim": width}
            return kind(**{k: v for k, v in given.items() if k in known})

        return cls(fields(CLIPConfig, "text_config"), fields(VisionConfig, "vision_config"))


# What a config.json leaves out has the value of transformers' own defaults, those of ViT-B/32.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "text_config": dict(
        hidden_size=512, intermediate_size=2048, num_attention_heads=8, eos_token_id=49407
    ),
    "vision_config": dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        patch_size=32,
    ),
}
VIT_L_14 = DualConfig(CLIPConfig(), VisionConfig())
VIT_H_14 = DualConfig(
    CLIPConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="gelu",
        projection_dim=1024,
    ),
    VisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        hidden_act="gelu",
        projection_dim=1024,
    ),
)


class CLIPVision(nnx.Module):
    """Pixels to the normalised state of the class token."""

    def __init__(self, config: VisionConfig, dtype: Any, rngs: nnx.Rngs):
        width, patch = config.hidden_size, (config.patch_size, config.patch_size)
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        patches = nnx.Conv(
            3, width, patch, strides=patch, padding=0, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.embeddings = nnx.Dict(
            {
                "class_embedding": nnx.Param(jnp.zeros((width,))),
                "patch_embedding": patches,
                "position_embedding": nnx.Embed(tokens, width, dtype=dtype, rngs=rngs),
            }
        )
        n = config.num_hidden_layers
        self.pre_layrnorm = clip_norm(config, dtype, rngs)  # the checkpoints' own spelling
        layers = stack(n, lambda r: CLIPLayer(config, dtype, r), rngs)
        self.encoder = nnx.Dict({"layers": nnx.Dict({f"0:{n}": layers})})
        self.post_layernorm = clip_norm(config, dtype, rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, H, W, 3] -> [B, D]."""
        embeddings: Any = self.embeddings
        x = embeddings["patch_embedding"](pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = embeddings["class_embedding"][...].astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2])), x], axis=1)
        x = x + embeddings["position_embedding"](jnp.arange(x.shape[1]))
        (layers,) = self.encoder["layers"].values()
        x = scan(layers, lambda layer, x: layer(x), self.pre_layrnorm(x))
        return self.post_layernorm(x[:, 0])


class CLIP(CLIPText):
    """`CLIPModel`. Embeddings are float32 and not normalised."""

    ignored: ClassVar[tuple[str, ...]] = (
        *CLIPText.ignored,
        "vision_model.embeddings.position_ids",
        "attn_mask",
    )
    full: ClassVar = ("logit_scale",)  # float32 in any dtype: bfloat16 would make 100 a 99

    def __init__(self, config: DualConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config.text, dtype=dtype, rngs=rngs)
        vision = config.vision
        self.vision_model = CLIPVision(vision, dtype, rngs)
        sizes = (vision.hidden_size, vision.projection_dim)
        self.visual_projection = Linear(*sizes, bias=False, dtype=dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(()))

    def embed_text(self, ids: jax.Array) -> jax.Array:
        """Ids i32 [B, L] -> [B, V]."""
        return self(ids)[1].astype(jnp.float32)

    def embed_image(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, H, W, 3] -> [B, V]."""
        return self.visual_projection(self.vision_model(pixels)).astype(jnp.float32)

    def scale(self) -> jax.Array:
        """Return the scalar that turns a cosine into a logit (100 in most published weights)."""
        return jnp.exp(self.logit_scale[...].astype(jnp.float32))


# ----------------------------------------------------------------------- checkpoints of open_clip

NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")


def from_open_clip(tensors: Tensors) -> Tensors:
    """Rename open_clip's tensors as in transformers; unknown names stay, for the loader to list.

    open_clip fuses q, k and v into `in_proj` (rows in this order) and keeps both projections
    transposed. A `module.` before every name, left by distributed training, is dropped.
    """
    out: Tensors = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        stem, _, leaf = name.rpartition(".")
        block = BLOCK.fullmatch(name)
        if block:
            visual, layer, part, leaf = block.groups()
            out |= _block(visual, layer, part, leaf, tensor)
        elif name in TRANSPOSED:
            flipped = Tensor(tensor.shape[::-1], lambda t=tensor: t.read().T)  # type: ignore[misc]
            out[TRANSPOSED[name]] = flipped
        elif name in NAMES:
            out[NAMES[name]] = tensor
        else:
            out[f"{NAMES[stem]}.{leaf}" if stem in NAMES else name] = tensor
    return out


def _block(visual: str | None, layer: str, part: str, leaf: str, tensor: Tensor) -> Tensors:
    root = f"{'vision' if visual else 'text'}_model.encoder.layers.{layer}"
    if part != "attn.in_proj":
        return {f"{root}.{PARTS.get(part, part)}.{leaf}": tensor}
    width = tensor.shape[0] // 3

    def third(i: int) -> Tensor:
        def read() -> np.ndarray:
            return tensor.read()[i * width : (i + 1) * width]

        return Tensor((width, *tensor.shape[1:]), read)

    return {f"{root}.self_attn.{x}_proj.{leaf}": third(i) for i, x in enumerate("qkv")}


def is_open_clip(tensors: Tensors) -> bool:
    return any(name.removeprefix("module.") == "visual.conv1.weight" for name in tensors)
