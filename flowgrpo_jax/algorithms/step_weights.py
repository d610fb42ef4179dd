"""Step weights: how much the loss of a stochastic step counts.

With h = sigma - sigma' and a transition of standard deviation std = s sqrt(h), the gradient of a
plain log-prob grows with sqrt(h) / s + s sqrt(h) (1 - sigma) / (2 sigma), which is some 20 times as
large at the end of the schedule as at its beginning. A row weighs it:

  none      1
  tempflow  2.25 std: TempFlow-GRPO (arXiv 2508.04324), with the constant of
            Shredded-Pork/TempFlow-GRPO, whose weights do not have the mean 1
  flash     the inverse of the growth above, over its mean in the range of windows: Flash-GRPO
            (2605.15980); Shredded-Pork/Flash-GRPO has it with the diffusion s = sigma_max sigma
  guard     1 / h: GRPO-Guard (2510.22319), which pairs it with the trust region of that name

Deviation: in GRPO-Guard's code s and sqrt(h) are means over the batch, whose images share the step;
so they do here.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flowgrpo_jax.sampling.sampler import Process

TEMPFLOW = 2.25


def none(process: Process, start: jax.Array, step: jax.Array) -> jax.Array:
    return jnp.float32(1)


def tempflow(process: Process, start: jax.Array, step: jax.Array) -> jax.Array:
    return TEMPFLOW * _std(process, step)


def flash(process: Process, start: jax.Array, step: jax.Array) -> jax.Array:
    def inverse(step: jax.Array) -> jax.Array:
        sigma, h, std = _sigma(process, step), _length(process, step), _std(process, step)
        return 1 / (h / std + std * (1 - sigma) / (2 * sigma))

    low, high = process.span or (0, process.window)
    steps = jnp.arange(low, high) + (0 if process.span else start)
    return inverse(step) / jax.vmap(inverse)(steps).mean()


def guard(process: Process, start: jax.Array, step: jax.Array) -> jax.Array:
    return 1 / _length(process, step)


# (process, the window's first step, step) -> f32 scalar
TABLE: dict[str, Callable[[Process, jax.Array, jax.Array], jax.Array]] = {
    "none": none,
    "tempflow": tempflow,
    "flash": flash,
    "guard": guard,
}


def _sigma(process: Process, step: jax.Array) -> jax.Array:
    return jnp.asarray(process.sigmas, jnp.float32)[step]


def _length(process: Process, step: jax.Array) -> jax.Array:
    return _sigma(process, step) - _sigma(process, step + 1)


def _std(process: Process, step: jax.Array) -> jax.Array:
    """Return the standard deviation of a step's transition, which depends on the step alone."""
    nothing = jnp.zeros((1, 1, 1, 1))
    return process.transition(nothing, nothing, step, noise=nothing).std
