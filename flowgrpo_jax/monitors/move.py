"""The size of the move: how far the policy's velocity is from the reference's, by noise level.

Along the policy's own ODE paths from fixed noise, at each step,

    E ||v_policy - v_reference||^2 / E ||v_reference||^2,

the mean being over images and latent dimensions. A move at high noise changes composition, one at
low noise texture; a policy that is far away at all levels has left what the base model knows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flowgrpo_jax import sharding
from flowgrpo_jax.sampling import sampler

STEPS = 8  # of the ODE
IMAGES = 8  # at least
BANDS = {"high": (2 / 3, 1.0), "middle": (1 / 3, 2 / 3), "low": (0.0, 1 / 3)}  # of sigma


@lru_cache(maxsize=32)
def program(
    guided: Callable[..., jax.Array], mesh: Mesh, latent: tuple[int, int, int], sigmas: tuple
) -> Callable[..., jax.Array]:
    """Return the program that measures the move at each of the steps, f32 [T].

    Args:
      guided: the velocity, made by `sampler.guided`.
      sigmas: the T + 1 noise levels of the ODE.
    """

    @jax.jit
    def measure_move(policy, reference, frozen, cond, empty, prompt, keys):
        """prompt: i32 [M], each image's row in `cond`; keys: [M] image keys."""

        def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]):
            sigma, following = pair
            v = guided(policy, frozen, x, sigma, cond, empty, prompt)
            own = guided(reference, frozen, x, sigma, cond, empty, prompt)
            move = jnp.mean((v - own) ** 2) / jnp.mean(own**2)
            return x + (following - sigma) * v, move

        x = sharding.constrain_rows(mesh, sampler.normal(keys, sampler.ODE_KEY, latent))
        levels = jnp.asarray(sigmas, jnp.float32)
        return jax.lax.scan(step, x, (levels[:-1], levels[1:]))[1]

    return measure_move


def figures(moves: np.ndarray, sigmas: tuple[float, ...]) -> dict[str, float]:
    """Return the mean of the moves, f32 [T], over the steps that begin in each band of noise."""
    begin = np.asarray(sigmas[:-1])
    found: dict[str, Any] = {}
    for name, (low, high) in BANDS.items():
        inside = (begin > low) & (begin <= high)
        if inside.any():
            found[f"move_{name}"] = float(moves[inside].mean())
    return found
