"""The flow-matching loss on true pictures: what the policy still knows of what it was trained on.

    E ||v(x, sigma) - (noise - z)||^2,  x = (1 - sigma) z + sigma noise,

over the latents z of pictures with captions, fixed noise and the noise levels LEVELS, without
guidance. DDRL (arXiv 2512.04332) trains on it as an anchor; here it is watched. The pictures, the
noise and the levels are the same at every evaluation, so that small changes can be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image, ImageOps

from flowgrpo_jax import sharding, tables
from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.storage import pictures

PICTURES = 32  # at most
LEVELS = (0.2, 0.4, 0.6, 0.8)  # of sigma
FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def load(source: str, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """Return up to PICTURES pictures, uint8 [n, height, width, 3], and their captions.

    Args:
      source: a folder of pictures NAME.png (or .jpg, .webp) with captions NAME.txt, or
        "package.module:name", a function that is given PICTURES and returns (picture, caption)
        pairs. Pictures are cut to the shape, around their centre, and resized.

    Raises ValueError where there is no such folder, or no picture with a caption.
    """
    if Path(source).is_dir():
        found = [
            (pictures.read(file), file.with_suffix(".txt").read_text().strip())
            for file in sorted(Path(source).iterdir())
            if file.suffix.lower() in FORMATS and file.with_suffix(".txt").exists()
        ]
    elif ":" not in source:
        raise ValueError(
            f"monitor.pictures={source!r}: there is no such folder; name a folder of NAME.png and"
            " NAME.txt, or a function as 'package.module:name'"
        )
    else:
        found = list(tables.find({}, source, "source of true pictures")(PICTURES))
    if not found:
        raise ValueError(
            f"monitor.pictures={source!r} holds no picture with a caption: put the caption of"
            " NAME.png into NAME.txt"
        )
    chosen = found[:PICTURES]
    return np.stack([_fitted(p, height, width) for p, _ in chosen]), [text for _, text in chosen]


def _fitted(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height)))


@lru_cache(maxsize=32)
def program(
    velocity: Callable[..., jax.Array], to_latents: Callable[..., jax.Array], mesh: Mesh
) -> Callable[..., jax.Array]:
    """Return the program that measures the loss of M pictures, f32 [M].

    Args:
      velocity: without guidance, made by `sampler.guided`.
      to_latents: (parameters of the VAE, uint8 [M, H, W, 3]) -> latents.
    """

    @jax.jit
    def measure_loss(policy, frozen, vae, images, cond, empty, prompt, keys):
        """images: uint8 [M, H, W, 3]; prompt: i32 [M], rows of `cond`; keys: [M] image keys."""
        z = sharding.constrain_rows(mesh, to_latents(vae, images).astype(jnp.float32))
        noise = sampler.normal(keys, sampler.ODE_KEY, z.shape[1:])

        def at(sigma: jax.Array) -> jax.Array:
            x = (1 - sigma) * z + sigma * noise
            v = velocity(policy, frozen, x, sigma, cond, empty, prompt)
            return jnp.mean((v - (noise - z)) ** 2, axis=(1, 2, 3))

        return jax.lax.map(at, jnp.asarray(LEVELS, jnp.float32)).mean(axis=0)

    return measure_loss
