"""What a model of the SD3 family is made of: the configs of its parts, from a directory or by name.

The published ones are written down here, so that their programs can be compiled and their memory
counted without their weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo_jax.files import read_json
from flowgrpo_jax.models.mmdit import MMDiTConfig
from flowgrpo_jax.models.text import CLIPConfig, T5Config
from flowgrpo_jax.models.vae import VAEConfig


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
    """
    kinds = dict(KINDS)
    if not (t5 and (directory / "text_encoder_3").is_dir()):
        del kinds["text_encoder_3"]
    parts: dict[str, Any] = {name: config(directory, name, kind) for name, kind in kinds.items()}
    return Architecture(**{"text_encoder_3": None, **parts}, shift=_shift(directory))


def config(directory: Path, component: str, kind: type) -> Any:
    """A component's config.json as our record; fields that we do not use are passed over.

    Raises FileNotFoundError, or ValueError for a field whose value is not supported.
    """
    file = directory / component / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: {directory} is no complete SD3 model")
    fields = {f.name for f in dataclasses.fields(kind)}
    written = read_json(file)
    for field, known in getattr(kind, "known", {}).items():
        value = written.get(field, known[0])
        if not set(value if isinstance(value, list) else [value]) <= set(known):
            raise ValueError(f"{file}: {field}={value!r} is not supported, only {known[0]!r}")
    raw = {k: v for k, v in written.items() if k in fields}
    if kind is MMDiTConfig and raw.get("out_channels", 0) is None:  # as many as go in
        raw["out_channels"] = raw.get("in_channels", MMDiTConfig.in_channels)
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})


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
    """Raises FileNotFoundError without a scheduler, ValueError for one that makes another schedule
    than `sde.sigma_schedule`."""
    file = directory / "scheduler" / "scheduler_config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: {directory} is no complete SD3 model")
    written = read_json(file)
    for field, known in SCHEDULER.items():
        value = written.get(field, known)
        if (value or None) != (known or None):  # null and 0 are as good as false
            raise ValueError(
                f"{file}: {field}={value!r} is not supported, only {known!r}: its schedule would"
                " be another here. Set the field to that if you do not mind"
            )
    return float(written.get("shift", 1.0))
