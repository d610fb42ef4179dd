"""Shared functions of decoupled algorithms: noise finished images again, and measure an error.

A decoupled algorithm learns from clean images x_0 that any sampler may have drawn. It noises them
to x = (1 - sigma) x_0 + sigma noise and looks at the velocity there, whose target is noise - x_0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.types import Rollout


class Renoised(NamedTuple):
    """Images at a noise level."""

    x: jax.Array  # f32 [M, H, W, C]
    sigma: jax.Array  # f32 [M]
    target: jax.Array  # f32 [M, H, W, C], the velocity that leads from x_0 to the noise


def renoise(rollout: Rollout, sigma: jax.Array, term: jax.Array) -> Renoised:
    """Noise a rollout's images to the level sigma [M], with fresh noise for each image and term."""
    x_0 = rollout.latents
    keys = jax.vmap(lambda key: jax.random.fold_in(key, sampler.RENOISE_KEY))(rollout.keys)
    noise = sampler.normal(keys, term, x_0.shape[1:])
    level = spread(sigma, x_0)
    return Renoised((1 - level) * x_0 + level * noise, sigma, noise - x_0)


def uniform(rollout: Rollout, term: jax.Array) -> jax.Array:
    """Draw a number in [0, 1) for each image and term, f32 [M], from the images' keys."""

    def draw(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, sampler.LEVEL_KEY)
        return jax.random.uniform(jax.random.fold_in(key, term))

    return jax.vmap(draw)(rollout.keys)


def stratum(rollout: Rollout, term: jax.Array, terms: int, low: int, high: int) -> jax.Array:
    """Draw a step in [low, high) for each image, i32 [M]: term k draws from the k-th of `terms`
    parts of the range, from low + floor(k (high - low) / terms) up to where the next part begins.
    """
    width = high - low
    begin, end = low + term * width // terms, low + (term + 1) * width // terms
    place = jnp.floor(uniform(rollout, term) * (end - begin)).astype(jnp.int32)
    return begin + jnp.minimum(place, end - begin - 1)


def strata(setup: Setup, levels: int, *, first: int = 1, share: float = 1.0) -> tuple[int, int]:
    """Return the range of steps whose noise levels are trained: from `first` to a share of all,
    of which the end is left out.

    Raises ValueError where there are fewer of them than levels.
    """
    steps = setup.process.steps
    low, high = first, int(share * steps + 1e-9)  # 0.29 of 100 steps are 29
    if high - low < levels:
        part = f" and share={share:g}" if share < 1 else ""
        raise ValueError(
            f"algorithm.options.levels={levels}: sample.steps={steps}{part} leave"
            f" {max(high - low, 0)} noise levels; choose fewer levels or more steps"
        )
    return low, high


def stratified(
    levels: int, *, first: int = 1, share: float = 1.0
) -> Callable[[Setup, jax.Array], jax.Array]:
    """Return the `terms` of a loss by `renoise_stratum`, one for each level. They raise what
    `strata` raises."""

    def terms(setup: Setup, key: jax.Array) -> jax.Array:
        strata(setup, levels, first=first, share=share)
        return jnp.arange(levels)

    return terms


def renoise_stratum(
    setup: Setup,
    rollout: Rollout,
    term: jax.Array,
    levels: int,
    *,
    first: int = 1,
    share: float = 1.0,
) -> Renoised:
    """Noise a rollout's images, term k to a level from the k-th part of the steps of `strata`."""
    sigmas = jnp.asarray(setup.process.sigmas, jnp.float32)
    low, high = strata(setup, levels, first=first, share=share)
    return renoise(rollout, sigmas[stratum(rollout, term, levels, low, high)], term)


def renoise_logit_normal(setup: Setup, rollout: Rollout, term: jax.Array) -> Renoised:
    """Noise a rollout's images to the levels of steps floor(u T), u = sigmoid(z), z ~ N(0, 1).

    SD3's density (arXiv 2403.03206) as flow_grpo's pair and regression losses take it: an index
    into the shifted schedule. Theirs has 1,000 steps; here it is the rollout's.
    """
    steps = setup.process.steps
    place = jax.nn.sigmoid(jax.scipy.special.ndtri(uniform(rollout, term)))
    step = jnp.minimum(jnp.floor(place * steps), steps - 1).astype(jnp.int32)
    return renoise(rollout, jnp.asarray(setup.process.sigmas, jnp.float32)[step], term)


def share_keys(rollout: Rollout, size: int) -> Rollout:
    """Give every `size` images in a row the first one's key, and so the same noise and levels."""
    places = jnp.arange(rollout.keys.shape[0])
    return replace(rollout, keys=rollout.keys[places // size * size])


def spread(value: jax.Array, like: jax.Array) -> jax.Array:
    """Reshape [M] so that it broadcasts over an array [M, ...]."""
    return value.reshape(-1, *(1,) * (like.ndim - 1))


def mean(x: jax.Array) -> jax.Array:
    """Average [M, ...] over all but the images."""
    return x.mean(tuple(range(1, x.ndim)))
