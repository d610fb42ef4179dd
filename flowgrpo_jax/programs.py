"""The jitted programs of a run, from plain parts. What they do is in `sampler` and `update`.

Each maker is cached: a second run of the same recipe in one process traces and compiles nothing. A
program holds functions and settings, never weights, which training may give up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flowgrpo_jax import sharding, update
from flowgrpo_jax.algorithms import Algorithm, Setup
from flowgrpo_jax.models.decoding import Decode
from flowgrpo_jax.sampling import branching, sampler, solvers, taped
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.scoring.differentiable import Judge
from flowgrpo_jax.types import NamedScores, Params, Pictures, Rollout, TrainState

HostScore = Callable[[jax.Array, jax.Array], NamedScores]
Guided = Callable[..., jax.Array]  # made by sampler.guided
cached = lru_cache(maxsize=32)


@cached
def sample(
    guided: Guided,
    decode: Decode,
    mesh: Mesh,
    process: Process,
    *,
    latent: tuple[int, int, int],
    neighbor_noise: float = 0.0,
    score: HostScore | None,
    tape: bool = False,
) -> Callable[..., tuple[Rollout, Pictures, NamedScores]]:
    """Rollout, decoding and, with `score`, the host rewards of a micro-batch.

    Args:
      tape: whether rollouts keep the forward passes of their window.
    """

    @jax.jit
    def draw_rollouts(policy, weights, cond, empty, key, epoch, start, ids, prompt, image, tail=0):
        """Return the rollout, its pictures and the host's scores (none without `score`).

        ids, prompt, image: i32 [M], the prompt's id, its row in `cond`, the place in the group.
        """

        def v(policy: Params, x: jax.Array, sigma: jax.Array) -> jax.Array:
            rows = rows_of(prompt, x)
            return guided(policy, weights["transformer"], x, sigma, cond, empty, rows)

        keys_of = partial(sampler.image_keys, key, epoch, ids)
        keys = first = keys_of(image)
        nodes = None
        if process.branches.leaves > 1:
            nodes = branching.nodes(process.branches, keys_of, image, sharding.row_shards(mesh))
            first = nodes.keys[0]
        if neighbor_noise:
            first = keys_of(jnp.zeros_like(image))
        x = first_noise(mesh, latent, first, keys, neighbor_noise)
        if tape:
            rollout = taped.rollout(v, policy, process, x, keys, start, prompt, tail)
        else:
            velocity = partial(v, policy)
            rollout = sampler.rollout(velocity, process, x, keys, start, prompt, tail, nodes)
        pixels, finite = decode(weights["vae"], rollout.latents)
        pictures = Pictures(sharding.constrain_rows(mesh, pixels), finite)
        return rollout, pictures, score(pictures.pixels, ids) if score else {}

    return draw_rollouts


def rows_of(prompt: jax.Array, x: jax.Array) -> jax.Array:
    """Return the rows in `cond` i32 [N] of images x [N, H, W, C], from those of M images, i32 [M].

    The N images are the first of every M / N in a row, for which a shared velocity is computed.
    """
    return prompt.reshape(x.shape[0], -1)[:, 0]


def first_noise(
    mesh: Mesh, latent: tuple[int, int, int], shared: jax.Array, own: jax.Array, share: float
) -> jax.Array:
    """Return the noise f32 [M, H, W, C] that rollouts start from, of unit variance.

    Args:
      shared, own: keys [M]: of the noise that images may have in common, and of each image's own.
      share: the factor of an image's own noise, from 0 to 1.
    """
    x = sharding.constrain_rows(mesh, sampler.normal(shared, sampler.ODE_KEY, latent))
    if not share:
        return x
    noise = sharding.constrain_rows(mesh, sampler.normal(own, sampler.OWN_KEY, latent))
    return math.sqrt(1 - share**2) * x + share * noise


@cached
def accumulate(
    guided: Guided,
    algorithm: Algorithm,
    setup: Setup,
    *,
    images: int,
    judge: Judge | None = None,
) -> Callable[..., update.Carry]:
    """Add a micro-batch's share to the gradient of an update over `images` images.

    Args:
      judge: the differentiable rewards, for an algorithm that takes their gradient.
    """

    @partial(jax.jit, donate_argnums=0)
    def add_gradient(
        gradient, figures, policy, others, frozen, cond, empty, rollout, advantage, terms, judged=()
    ):
        """judged: the judge's inputs."""

        def v(params: Params, x: jax.Array, sigma: jax.Array, rows: Any = None) -> jax.Array:
            drawn = rollout.prompt if rows is None else rollout.prompt[rows]
            return guided(params, frozen, x, sigma, cond, empty, rows_of(drawn, x))

        score = judge and (lambda latents: judge(judged, latents, rollout.prompt))
        carry = gradient, figures
        return update.accumulate(
            algorithm, setup, v, policy, others, rollout, advantage, terms, images, carry, score
        )

    return add_gradient


@cached
def apply(
    optimiser: Any, ema_decay: float
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """One optimiser step from an accumulated gradient."""

    @jax.jit
    def apply_gradient(state, gradient):
        return update.apply_gradient(state, gradient, optimiser, ema_decay)

    return apply_gradient


@cached
def end_epoch(algorithm: Algorithm) -> Callable[[TrainState, jax.Array], TrainState]:
    """The step of the algorithm's copies at the end of an epoch; nothing for one without copies."""
    if not algorithm.copies:
        return lambda state, begun: state

    @jax.jit
    def end_epoch(state, begun):
        return update.end_epoch(state, begun, algorithm)

    return end_epoch


@cached
def generate(
    guided: Guided,
    decode: Decode,
    mesh: Mesh,
    *,
    latent: tuple[int, int, int],
    sigmas: tuple[float, ...],
    solver: solvers.Solver = solvers.EULER,
) -> Callable[..., Pictures]:
    """Deterministic images by the ODE."""

    @jax.jit
    def draw_images(policy, weights, cond, empty, prompt, keys):
        """Return the pictures of image keys [M] and each image's row in `cond`, i32 [M]."""

        def v(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return guided(policy, weights["transformer"], x, sigma, cond, empty, prompt)

        x = sharding.constrain_rows(mesh, sampler.normal(keys, sampler.ODE_KEY, latent))
        return decode(weights["vae"], sampler.ode(v, sigmas, x, solver))

    return draw_images


@cached
def to_latents(
    encode: Callable[[Params, jax.Array], jax.Array] | None,
) -> Callable[[Params, jax.Array], jax.Array]:
    """Latents of pictures, uint8 [M, H, W, 3] -> f32 [M, H, W, C]."""
    if encode is None:
        raise ValueError("data.source: this kind of model reads no pictures; choose 'base'")
    return jax.jit(encode)


@cached
def draw_base(
    guided: Guided,
    mesh: Mesh,
    *,
    latent: tuple[int, int, int],
    sigmas: tuple[float, ...],
    solver: solvers.Solver,
) -> Callable[..., jax.Array]:
    """The base model's own latents, by the ODE from noise that no rollout has."""

    @jax.jit
    def draw_latents(policy, frozen, cond, empty, key, epoch, ids, places, rows):
        def v(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return guided(policy, frozen, x, sigma, cond, empty, rows)

        keys = sampler.image_keys(key, epoch, ids, places)
        x = sharding.constrain_rows(mesh, sampler.normal(keys, sampler.DATA_KEY, latent))
        return sampler.ode(v, sigmas, x, solver)

    return draw_latents


@cached
def add_data(
    guided: Guided, *, images: int, weight: float, leaves: int = 1
) -> Callable[..., tuple[Params, jax.Array]]:
    """Add weight x the flow-matching loss of M of `images` pictures to a gradient.

    Args:
      leaves: images of a group that start from the same noise.
    """

    @partial(jax.jit, donate_argnums=0)
    def add_data_gradient(
        gradient, total, policy, frozen, cond, empty, key, epoch, levels, x_0, ids, places, rows
    ):
        """Return the gradient, and the loss so far, unweighted. levels: f32 [K]."""
        keys = sampler.image_keys(key, epoch, ids, places // leaves * leaves)
        noise = sampler.normal(keys, sampler.ODE_KEY, x_0.shape[1:])
        return update.add_matching(
            lambda p, x, sigma: guided(p, frozen, x, sigma, cond, empty, rows),
            policy,
            (x_0, noise),
            levels,
            1 / (images * levels.shape[0]),
            weight,
            (gradient, total),
        )

    return add_data_gradient
