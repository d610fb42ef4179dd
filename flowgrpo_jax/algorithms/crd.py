"""Centred reward distillation: the policy's implicit reward matches the true one.

Source: CRD (arXiv 2603.14128) by the trainer of X-GenGroup/Flow-Factory (trainers/rl/crd.py) and
its recipe for SD3.5. With the error e(v) = |v - Y|^2 / w, w being the mean absolute error as a
constant, and R = clip(A / (2 C) + 1/2, 0, 1),

    r = e(v_old) - e(v),
    loss = C / beta (beta (r - mean r) - (R - mean R))^2 + kl_beta (m + R (1 - m)) |v - v_ref|^2,

in which mean r is a constant and m = 1e-4 / kl_beta. The means are those over all images of an
update: as in that trainer, not those of a group. Two copies move: "old", and "drawer", which draws
the images.

The means may be weighted. The square is then the average of two: in one the means are weighted
towards good images, by p, in the other towards bad ones, by q,

    softmax    p = softmax(R / T),   q = softmax(-R / T)
    hard       p = softmax(R) of the images with A > 0 alone, q = softmax(-R) of those with A < 0;
               all images alike where there are none.

Deviations: the trainer's "hard" asks whether R, which lies in [0, 1], is above or below 0, so that
its second pool is always empty; here the pools go by the sign of A, and each other's mirror image.
Its cross-entropy is left out; each draw visits the next of the rollout's noise levels, in turn; the
reference has the guidance of the rollout, and 4.5 there; errors are f32 in place of f64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import (
    Algorithm,
    Figures,
    Setup,
    Velocities,
    copies,
    options,
)
from flowgrpo_jax.algorithms.matching import distance, normalised_velocity_error
from flowgrpo_jax.algorithms.renoise import mean, renoise
from flowgrpo_jax.types import Credit, Rollout

LEAST_KL = 1e-4  # weight of the KL of an image with R = 0


def make(
    levels: int = 20,
    beta: float = 1.0,
    advantage_clip: float = 5.0,
    center: str = "update",
    center_weights: str = "uniform",
    temperature: float = 1.0,
    kl_beta: float = 0.1,
    old_first: float = 0.25,
    old_rate: float = 5e-3,
    old_most: float = 0.999,
    drawer_flat: int = 75,
    drawer_rate: float = 7.5e-3,
    drawer_most: float = 0.999,
) -> Algorithm:
    """
    Args:
      levels: draws of a noise level and noise for an image an update.
      beta: scale of the implicit reward.
      advantage_clip: the advantage C at which R is 1; keep it at `advantage.clip`.
      center: whose mean is subtracted, "update" as published, or "group".
      center_weights: of the images in that mean, "uniform", "hard" or "softmax", as above.
      temperature: T of "softmax".
      kl_beta: weight of the squared distance to the velocity before training, of an image with
        R = 1; 0 spares its forward pass.
      old_first, old_rate, old_most: after n optimiser steps "old" keeps
        min(old_first + n x old_rate, old_most) of itself at the end of an epoch. These defaults are
        the paper's for rendered text; Flow-Factory's general ones are 0.25, 1e-3 and 0.5.
      drawer_flat, drawer_rate, drawer_most: the same for "drawer", which keeps
        min(max(n - drawer_flat, 0) x drawer_rate, drawer_most).
    """
    options.at_least(1, levels=levels)
    options.positive(beta=beta, temperature=temperature, advantage_clip=advantage_clip)
    options.at_least(0, kl_beta=kl_beta, old_rate=old_rate)
    options.at_least(0, drawer_flat=drawer_flat, drawer_rate=drawer_rate)
    options.below_one(old_first=old_first, old_most=old_most, drawer_most=drawer_most)
    options.one_of(("update", "group"), center=center)
    options.one_of(WEIGHTS, center_weights=center_weights)

    return Algorithm(
        partial(
            _loss,
            beta=beta,
            advantage_clip=advantage_clip,
            weigh=partial(_weigh, center, center_weights, temperature),
            kl_beta=kl_beta,
        ),
        terms=lambda setup, key: jnp.arange(levels),
        figures=("policy_loss", "kl", "old_distance"),
        draws="drawer",
        reads=("old", "reference") if kl_beta else ("old",),
        copies={
            "old": copies.rising(old_rate, old_most, first=old_first),
            "drawer": copies.rising(drawer_rate, drawer_most, flat=drawer_flat),
        },
        whole=center,
        weighs_kl=kl_beta > 0,
        summary=f"CRD, {levels} noise levels an image, centred over the {center}"
        f" ({center_weights}), KL {kl_beta:g}",
    )


def _loss(
    setup: Setup,
    v: Velocities,
    rollout: Rollout,
    term: jax.Array,
    credit: Credit,
    *,
    beta: float,
    advantage_clip: float,
    weigh: Callable[[jax.Array, jax.Array, int], Sequence[jax.Array]],
    kl_beta: float,
) -> tuple[jax.Array, Figures]:
    """Return the loss [M] of images that are noised for the `term`-th time, and its figures."""
    sigma = jnp.asarray(setup.process.sigmas, jnp.float32)[term % setup.process.steps]
    noised = renoise(rollout, jnp.broadcast_to(sigma, rollout.prompt.shape), term)
    velocity, old = (v[name](noised.x, noised.sigma) for name in ("policy", "old"))
    implicit = normalised_velocity_error(old, noised) - normalised_velocity_error(velocity, noised)
    reward = jnp.clip(credit.advantage / (2 * advantage_clip) + 0.5, 0, 1)
    directions = weigh(reward, credit.advantage, setup.group_size)
    value = squared_gap(implicit, reward, directions, beta) * advantage_clip / beta
    to_reference = distance(v, "reference", kl_beta, velocity, noised)
    figures = {
        "policy_loss": value,
        "kl": to_reference,
        "old_distance": mean(jnp.square(velocity - old)),
    }
    least = min(LEAST_KL, kl_beta)  # kl_beta x m
    held = (least + reward * (kl_beta - least)) * credit.weigh(to_reference)
    return value + held, figures


def _weigh(
    center: str,
    center_weights: str,
    temperature: float,
    reward: jax.Array,
    advantage: jax.Array,
    group_size: int,
) -> tuple[jax.Array, ...]:
    """Return the weights of M images in the means, [M / N, N] for each direction: a row for every
    N images that have a mean in common."""
    size = group_size if center == "group" else len(reward)
    rows = reward.reshape(-1, size), advantage.reshape(-1, size)
    return WEIGHTS[center_weights](*rows, temperature)


def squared_gap(
    implicit: jax.Array, reward: jax.Array, directions: Sequence[jax.Array], beta: float
) -> jax.Array:
    """Return (beta (r - mean r) - (R - mean R))^2 [M], averaged over the means' directions."""
    gaps = [beta * _centred(implicit, p) - _centred(reward, p) for p in directions]
    return jnp.stack([jnp.square(gap) for gap in gaps]).mean(0)


def _centred(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Subtract from x [M] its weighted mean, as a constant, over each row of weights [M / N, N]."""
    rows = x.reshape(weights.shape)
    means = jax.lax.stop_gradient((weights * rows).sum(1, keepdims=True))
    return (rows - means).reshape(-1)


def _pool(reward: jax.Array, member: jax.Array) -> jax.Array:
    """Return softmax(reward) over the members of each row, and equal weights where there are none.

    Args:
      reward: f32 [N, size]; member: bool [N, size].
    """
    some = member.any(1, keepdims=True)
    return jax.nn.softmax(jnp.where(member, reward, jnp.where(some, -jnp.inf, 0.0)), axis=1)


# The weights of the images in the means, one array for each direction, each of sum 1 along a row:
# f(R [N, size], A [N, size], temperature).
WEIGHTS: dict[str, Callable[[jax.Array, jax.Array, float], tuple[jax.Array, ...]]] = {
    "uniform": lambda r, a, t: (jnp.full_like(r, 1 / r.shape[1]),),
    "hard": lambda r, a, t: (_pool(r, a > 0), _pool(-r, a < 0)),
    "softmax": lambda r, a, t: (jax.nn.softmax(r / t, axis=1), jax.nn.softmax(-r / t, axis=1)),
}
