"""A published transformer and VAE with random weights, for measuring speed without a download.

The text encoders are tiny ones: text is encoded outside of what is timed, and their states have
the published shapes (CLIP 77 tokens, pooled 768 + 1280 wide, T5 4096 wide).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from flowgrpo_jax.models import sd3
from flowgrpo_jax.models.sd3.architecture import PUBLISHED, Architecture
from flowgrpo_jax.worlds.pretraining import flow, package
from flowgrpo_jax.worlds.pretraining.tokenizers import sizes, write_tokenizers
from flowgrpo_jax.worlds.shapes.world import WORLD

PREFIX = "random:"
CLIP_TOKENS = 77


def find(model: str, folder: Path) -> Path | None:
    """The directory of "random:NAME", made in `folder` if it is not there; None for another model.

    NAME is a published model's, without organisation and with any of its usual short forms
    ("sd3.5-medium"), or its whole id. Raises ValueError for one that is not known.
    """
    if not model.startswith(PREFIX):
        return None
    wanted = model.removeprefix(PREFIX)
    short = {name: name.split("/")[1].replace("stable-diffusion-", "sd") for name in PUBLISHED}
    for name, parts in PUBLISHED.items():
        if wanted in (name, short[name]):
            made = folder / short[name]
            last = made / "text_encoder_3" / "model.safetensors"  # that `package.write` writes
            return made if last.exists() else write(parts, made)
    raise ValueError(f"--model={model}: choose {PREFIX} and one of {', '.join(short.values())}")


def write(parts: Architecture, directory: Path, seed: int = 0) -> Path:
    """A model in diffusers layout, in half precision."""
    write_tokenizers(directory, WORLD.words, CLIP_TOKENS)
    n_clip, n_t5 = sizes(WORLD.words)

    def clip(width: int, activation: str) -> Any:
        return replace(flow.clip_config(n_clip, CLIP_TOKENS, activation), projection_dim=width)

    parts = replace(
        parts,
        text_encoder=clip(768, "quick_gelu"),
        text_encoder_2=clip(1280, "gelu"),
        text_encoder_3=replace(flow.t5_config(n_t5), d_model=parts.transformer.joint_attention_dim),
    )
    model, seeds = sd3.describe(parts), count(seed)
    params = {
        name: drawn(shapes, lambda: np.random.default_rng(next(seeds)))
        for name, shapes in (model.params | model.text_shapes).items()
    }
    package.write(
        directory, params, parts.transformer, parts.vae, parts.text_encoder,
        parts.text_encoder_2, parts.text_encoder_3,
    )  # fmt: skip
    return directory


def drawn(shapes: Any, generator: Callable[[], np.random.Generator]) -> dict[str, np.ndarray]:
    """Weights that keep activations near one: kernels by their fan-in, norms 1, biases 0."""

    def draw(item: tuple[str, Any, np.random.Generator]) -> np.ndarray:
        path, shape, rng = item
        kind = path.rsplit("/", 1)[-1]
        if kind in ("scale", "bias"):
            return np.full(shape, kind == "scale", np.float32)
        inputs = shape[-2] if len(shape) < 4 else np.prod(shape[:-1])
        deviation = inputs**-0.5 if kind == "kernel" else 0.02
        return rng.standard_normal(shape, np.float32) * np.float32(deviation)

    items = [(path, x.shape, generator()) for path, x in shapes.items()]
    with ThreadPoolExecutor() as pool:  # numpy draws without the interpreter's lock
        return dict(zip(shapes, pool.map(draw, items)))
