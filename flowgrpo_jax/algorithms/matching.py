"""Signed matching: the errors and distances of which decoupled algorithms make their losses.

At a noised image (renoise.py) the policy's velocity v has an error to the target Y = noise - x_0.
DiffusionNFT, AWM, DGPO, CRD, V-GRPO, RAM and the regressions lower it for good images and raise it
for bad ones,

    A w(sigma) error(v) + distances |v - v_other|^2,

and differ in the error, its weight, the noise that images share, the distances and the trust
region. On policy they have gradients in common, which tests/test_matching.py states.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Velocities
from flowgrpo_jax.algorithms.renoise import Renoised, mean, spread

FLOOR = 1e-5  # least size of an error that it is divided by


def velocity_error(velocity: jax.Array, noised: Renoised) -> jax.Array:
    """Return |v - Y|^2 of M images, f32 [M]."""
    return mean(jnp.square(velocity - noised.target))


def normalised_velocity_error(velocity: jax.Array, noised: Renoised) -> jax.Array:
    """Return |v - Y|^2 / w of M images, f32 [M], w being the mean absolute error as a constant."""
    return _normalised(velocity - noised.target)


def image_error(velocity: jax.Array, x: jax.Array, sigma: jax.Array, x_0: jax.Array) -> jax.Array:
    """Return |x_0(v) - x_0|^2 / w of M images, f32 [M]: how far the predicted images are off.

    Args:
      velocity, x, x_0: f32 [M, H, W, C]; sigma: f32 [M].
    """
    return _normalised(x - spread(sigma, x) * velocity - x_0)


def distance(
    v: Velocities, name: str, weight: float, velocity: jax.Array, noised: Renoised
) -> jax.Array:
    """Return |v - v_name|^2 of M images, f32 [M]; 0 and no forward pass where its weight is 0."""
    if not weight:
        return jnp.zeros(velocity.shape[0])
    return mean(jnp.square(velocity - v[name](noised.x, noised.sigma)))


def group_sum(x: jax.Array, group_size: int) -> jax.Array:
    """Return the sum [M] of x [M] over each image's group; the M images are whole groups."""
    return jnp.repeat(x.reshape(-1, group_size).sum(1), group_size)


def _normalised(miss: jax.Array) -> jax.Array:
    size = jax.lax.stop_gradient(jnp.maximum(mean(jnp.abs(miss)), FLOOR))
    return mean(jnp.square(miss)) / size
