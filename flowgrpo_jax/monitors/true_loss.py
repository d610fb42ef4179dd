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
from PIL import Image

from flowgrpo_jax import sharding, tables
from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.storage import pictures

PICTURES = 32  # at most
LEVELS = (0.2, 0.4, 0.6, 0.8)  # of sigma


def load(source: str, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """Return up to PICTURES pictures, uint8 [n, height, width, 3], and their captions.

    Args:
      source: a folder of pictures NAME.png (or .jpg, .webp) with captions NAME.txt, or
        "package.module:name", a function that is given PICTURES and returns (picture, caption)
        pairs. Pictures are cut to the shape, around their centre, and resized.

    Raises ValueError where there is no such folder or no picture, FileNotFoundError for a picture
    without a caption.
    """
    if Path(source).is_dir():
        listed = list(pictures.with_captions(Path(source)))
        found = [(pictures.read(file), caption) for file, caption in listed[:PICTURES]]
    elif ":" not in source:
        raise ValueError(
            f"monitor.pictures={source!r}: there is no such folder; name a folder of NAME.png and"
            " NAME.txt, or a function as 'package.module:name'"
        )
    else:
        found = list(tables.find({}, source, "source of true pictures")(PICTURES))
    if not found:
        raise ValueError(
            f"monitor.pictures={source!r} gives no picture: a folder needs NAME.png and its caption"
            " in NAME.txt, and a function must return one or more (picture, caption)"
        )
    images, captions = zip(*found[:PICTURES])
    bicubic = Image.Resampling.BICUBIC
    return np.stack([pictures.fitted(p, height, width, bicubic) for p in images]), list(captions)


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
