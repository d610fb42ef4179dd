"""Pretraining, part three: write the trained model as a directory in diffusers layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from flowgrpo_jax.models import convert, layers
from flowgrpo_jax.models.layers import Params
from flowgrpo_jax.models.sd3.mmdit import MMDiTConfig
from flowgrpo_jax.models.text import CLIPConfig, T5Config
from flowgrpo_jax.models.vae import VAEConfig

INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
    "feature_extractor": [None, None],
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}


def _json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def _vae(config: VAEConfig, size: int) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "force_upcast": False,
        "sample_size": size,
        **dataclasses.asdict(config),
    }


def _clip(config: CLIPConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "bos_token_id": config.eos_token_id - 1,
        "pad_token_id": config.eos_token_id,
        **dataclasses.asdict(config),
    }


def _t5(config: T5Config) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        **dataclasses.asdict(config),
    }


def read(
    directory: Path, modules: Mapping[str, Callable[[nnx.Rngs], nnx.Module]]
) -> dict[str, Params]:
    """The f32 weights of the named components of a written model, to go on training from."""
    params = {}
    for name, create in modules.items():
        module = nnx.eval_shape(lambda c=create: c(nnx.Rngs(0)))
        _, shapes = layers.functional(module)
        ignore, tied = getattr(module, "ignored", ()), getattr(module, "tied", {})
        params[name] = convert.load(directory / name, shapes, ignore=ignore, tied=tied)
    return params


def write(
    directory: Path,
    params: dict[str, Params],
    transformer: MMDiTConfig,
    vae: VAEConfig,
    clip_l: CLIPConfig,
    clip_g: CLIPConfig,
    t5: T5Config,
    *,
    dtype: Any = np.float16,
) -> None:
    """Write configs and weights (half precision on disk; f32 again where they are loaded).

    The tokenizers are written by `tokenizers.write_tokenizers` into the same directory.
    """
    size = transformer.sample_size * vae.downsampling
    configs = {
        "transformer": {"_class_name": "SD3Transformer2DModel", **dataclasses.asdict(transformer)},
        "vae": _vae(vae, size),
        "text_encoder": _clip(clip_l),
        "text_encoder_2": _clip(clip_g),
        "text_encoder_3": _t5(t5),
    }
    _json(directory / "model_index.json", INDEX)
    _json(directory / "scheduler" / "scheduler_config.json", SCHEDULER)
    for name, config in configs.items():
        _json(directory / name / "config.json", config)
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        file = directory / name / f"{stem}.safetensors"
        convert.save(params[name], file, dtype=dtype, patch_size=transformer.patch_size)
