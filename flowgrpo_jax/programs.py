"""The jitted programs of a run, from plain parts. What they do is in `sampler` and `update`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flowgrpo_jax import sampler, sharding, update
from flowgrpo_jax.models.sd3 import SD3
from flowgrpo_jax.sampler import Process
from flowgrpo_jax.types import Params, Scores, TrainState, Trajectory
from flowgrpo_jax.update import Objective

HostScore = Callable[[jax.Array, jax.Array], Scores]


def sample(
    model: SD3,
    mesh: Mesh,
    process: Process,
    *,
    guidance: float,
    latent: tuple[int, int, int],
    same_noise: bool,
    score: HostScore | None,
) -> Callable[..., tuple[Trajectory, jax.Array, Scores]]:
    """Rollout, decoding and, with `score`, the host rewards of a micro-batch."""
    # No closure over the model: programs outlive weights that training gives up.
    guided, decode = sampler.guided(model.velocity, guidance), model.decode

    @jax.jit
    def run(lora, weights, cond, null, key, epoch, start, ids, prompt, image):
        """-> trajectory, images uint8 [M, ...], the host's scores (none without `score`).

        ids, prompt, image: i32 [M], the prompt's id, its row in `cond`, the place in the group.
        """

        def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return guided(lora, weights["transformer"], x, sigma, cond, null, prompt)

        keys = sampler.image_keys(key, epoch, ids, image)
        first = sampler.image_keys(key, epoch, ids, jnp.zeros_like(image)) if same_noise else keys
        x = sharding.constrain_rows(mesh, sampler.normal(first, sampler.ODE_KEY, latent))
        trajectory = sampler.rollout(velocity, process, x, keys, start, prompt)
        images = sharding.constrain_rows(mesh, decode(weights["vae"], trajectory.latents))
        return trajectory, images, score(images, ids) if score else {}

    return run


def accumulate(
    model: SD3, process: Process, objective: Objective, *, guidance: float, images: int
) -> Callable[..., tuple[Params, dict[str, jax.Array]]]:
    """Add a micro-batch's share to the gradient of an update over `images` images."""
    guided = sampler.guided(model.velocity, guidance)

    @partial(jax.jit, donate_argnums=0)
    def run(gradient, figures, lora, reference, base, cond, null, trajectory, advantage, start,
            trained):  # fmt: skip
        def velocity(lora: Params, x: jax.Array, sigma: jax.Array) -> jax.Array:
            return guided(lora, base, x, sigma, cond, null, trajectory.prompt)

        return update.accumulate(
            velocity,
            process,
            objective,
            lora,
            reference,
            trajectory,
            advantage,
            start,
            trained,
            images,
            gradient,
            figures,
        )

    return run


def apply(
    optimiser: Any, ema_decay: float
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """One optimiser step from an accumulated gradient."""
    return jax.jit(
        lambda state, gradient: update.apply_gradient(state, gradient, optimiser, ema_decay)
    )


def generate(
    model: SD3, mesh: Mesh, *, guidance: float, latent: tuple[int, int, int], sigmas: np.ndarray
) -> Callable[..., jax.Array]:
    """Deterministic images by the ODE."""
    # No closure over the model: programs outlive weights that training gives up.
    guided, decode = sampler.guided(model.velocity, guidance), model.decode

    @jax.jit
    def run(lora, weights, cond, null, prompt, keys):
        """-> images uint8 [M, ...] from image keys [M] and each image's row in `cond`, i32 [M]."""

        def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return guided(lora, weights["transformer"], x, sigma, cond, null, prompt)

        x = sharding.constrain_rows(mesh, sampler.normal(keys, sampler.ODE_KEY, latent))
        return decode(weights["vae"], sampler.ode(velocity, sigmas, x))

    return run
