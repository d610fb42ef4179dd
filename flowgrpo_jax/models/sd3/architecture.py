"""The configs of the parts of an SD3 model, read from a model directory or known by name.

The published ones are written down here, so that their programs can be compiled and their memory
counted without their weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo_jax.models.sd3.mmdit import MMDiTConfig
from flowgrpo_jax.models.text import CLIPConfig, T5Config
from flowgrpo_jax.models.vae import VAEConfig
from flowgrpo_jax.storage.files import read_object


@dataclass(frozen=True)
class Architecture:
    """The parts by the names of their folders; `text_encoder_3` is None for a model without T5."""

    transformer: MMDiTConfig
    vae: VAEConfig
    text_encoder: CLIPConfig
    text_encoder_2: CLIPConfig
    text_encoder_3: T5Config | None
    shift: float = 3.0  # of the sigma schedule

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Latent [H, W, C] of an image of height x width pixels.

        Raises ValueError for a size that is no whole number of patches, or exceeds the position
        grid.
        """
        down, unit = self.vae.downsampling, self.transformer.patch_size * self.vae.downsampling
        sides = range(unit, unit * self.transformer.pos_embed_max_size + 1, unit)
        if height not in sides or width not in sides:
            h, w = (min(sides, key=lambda side: abs(side - n)) for n in (height, width))
            raise ValueError(
                f"image size {height} x {width}: both must be multiples of {unit} px and at most"
                f" {sides[-1]}, where this model's position grid ends; the nearest is {h} x {w}"
            )
        return height // down, width // down, self.transformer.in_channels


KINDS = {
    "transformer": MMDiTConfig,
    "vae": VAEConfig,
    "text_encoder": CLIPConfig,
    "text_encoder_2": CLIPConfig,
    "text_encoder_3": T5Config,
}
CLIP_L = CLIPConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="quick_gelu",
    projection_dim=768,
)
CLIP_BIG_G = CLIPConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)


def _published(transformer: MMDiTConfig) -> Architecture:
    return Architecture(transformer, VAEConfig(), CLIP_L, CLIP_BIG_G, T5Config())


PUBLISHED = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _published(
        MMDiTConfig(pos_embed_max_size=192)
    ),
    "stabilityai/stable-diffusion-3.5-medium": _published(
        MMDiTConfig(dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
    ),
    "stabilityai/stable-diffusion-3.5-large": _published(
        MMDiTConfig(
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        )
    ),
}


def read(directory: Path, *, t5: bool = True) -> Architecture:
    """The architecture of a directory in diffusers layout.

    Args:
      t5: false leaves the largest text encoder out; so does a directory that lacks it.
    Raises:
      FileNotFoundError: a part's config.json is missing, by name.
      ValueError: a field that is not supported, or parts that do not fit each other.
    """
    kinds = dict(KINDS)
    if not (t5 and (directory / "text_encoder_3").is_dir()):
        del kinds["text_encoder_3"]
    parts: dict[str, Any] = {name: config(directory, name, kind) for name, kind in kinds.items()}
    found = Architecture(**{"text_encoder_3": None, **parts}, shift=_shift(directory))
    if problems := contradictions(found):
        raise ValueError(
            f"the parts of {directory} do not fit each other: {'; '.join(problems)}. Take all of"
            " them from one model"
        )
    return found


def contradictions(parts: Architecture) -> list[str]:
    """List where the configs of a model's parts disagree about the arrays they exchange."""
    transformer, vae, t5 = parts.transformer, parts.vae, parts.text_encoder_3
    clips = (parts.text_encoder, parts.text_encoder_2)
    states, pooled = sum(c.hidden_size for c in clips), sum(c.projection_dim for c in clips)
    width, channels = transformer.joint_attention_dim, transformer.in_channels
    equal = [
        ("in_channels of the transformer", channels, "latent_channels of the vae",
         vae.latent_channels),
        ("in_channels of the transformer", channels, "its out_channels", transformer.out_channels),
        ("pooled_projection_dim of the transformer", transformer.pooled_projection_dim,
         "the sum of the projection_dim of text_encoder and text_encoder_2", pooled),
        ("in_channels of the vae", vae.in_channels, "the channels of a picture", 3),
        ("out_channels of the vae", vae.out_channels, "the channels of a picture", 3),
    ]  # fmt: skip
    if t5:
        name = "joint_attention_dim of the transformer"
        equal.append((name, width, "d_model of text_encoder_3", t5.d_model))
    problems = [
        f"{name} is {value}, but {other} is {wanted}"
        for name, value, other, wanted in equal
        if value != wanted
    ]
    if states > width:
        problems.append(
            f"joint_attention_dim of the transformer is {width}, but the hidden_size of"
            f" text_encoder and text_encoder_2 sum up to {states}"
        )
    return problems


def config(directory: Path, component: str, kind: type) -> Any:
    """A component's config.json as our record; fields that we do not use are passed over.

    Raises FileNotFoundError, or ValueError for a field whose value is not supported.
    """
    file = directory / component / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist: {directory} is no complete SD3 model; download all of it"
        )
    fields = {f.name for f in dataclasses.fields(kind)}
    written = read_object(file)
    for field, known in getattr(kind, "known", {}).items():
        value = written.get(field, known[0])
        if not set(value if isinstance(value, list) else [value]) <= set(known):
            raise ValueError(f"{file}: {field}={value!r} is not supported, only {known[0]!r}")
    raw = {k: v for k, v in written.items() if k in fields}
    if kind is MMDiTConfig and raw.get("out_channels", 0) is None:  # as many as go in
        raw["out_channels"] = raw.get("in_channels", MMDiTConfig.in_channels)
    hints = typing.get_type_hints(kind)
    for field, value in raw.items():
        if not _is_a(value, hints[field]):
            raise ValueError(
                f"{file}: {field} is {json.dumps(value)}, it must be of the type {hints[field]}:"
                " correct the file, or download it again"
            )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})


def _is_a(value: Any, hint: Any) -> bool:
    """Return whether a value from JSON has the type of a config's field."""
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_is_a(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, float) or _is_a(value, int)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


# Of the scheduler's config, what decides on the sigmas and steps besides `shift`: absent, or this.
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}


def _shift(directory: Path) -> float:
    """The shift of the sigma schedule; 1 where the config leaves it out, as in diffusers.

    Raises FileNotFoundError without a scheduler, ValueError for one that makes another schedule
    than `sde.sigma_schedule`.
    """
    file = directory / "scheduler" / "scheduler_config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist: {directory} is no complete SD3 model; download all of it"
        )
    written = read_object(file)
    for field, known in SCHEDULER.items():
        value = written.get(field, known)
        if (value or None) != (known or None):  # null and 0 are as good as false
            raise ValueError(
                f"{file}: {field}={value!r} is not supported, only {known!r}: its schedule would"
                " be another here. Set the field to that if you do not mind"
            )
    shift = written.get("shift", 1.0)
    if not (_is_a(shift, float) and 0 < shift < math.inf):
        raise ValueError(
            f"{file}: shift is {json.dumps(shift)}, it must be a number above 0; the SD3 models"
            " have 3.0"
        )
    return float(shift)
