"""Centred reward distillation: the policy's implicit reward matches the true one.

Source: CRD (arXiv 2603.14128) by the trainer of X-GenGroup/Flow-Factory (trainers/rl/crd.py) and
its recipe for SD3.5. With the error e(v) = |v - Y|^2 / w, w being the mean absolute error as a
constant, and R = clip(A / (2 C) + 1/2, 0, 1),

    r = e(v_old) - e(v),
    loss = C / beta (beta (r - mean r) - (R - mean R))^2 + kl_beta (m + R (1 - m)) |v - v_ref|^2,

in which mean r is a constant and m = 1e-4 / kl_beta. The means are those over all images of an
update: as in that trainer, not those of a group. Two copies move: "old", and "drawer", which draws
the images.

Deviations: the trainer's other weights for the means (hard, softmax) and its cross-entropy are left
out; each draw visits the next of the rollout's noise levels, in turn; the reference has the
guidance of the rollout, and 4.5 there; errors are f32 in place of f64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Figures, Setup, Velocities, advantage_of, copies
from flowgrpo_jax.algorithms.matching import distance, normalised_velocity_error
from flowgrpo_jax.algorithms.renoise import mean, renoise
from flowgrpo_jax.types import Rollout

LEAST_KL = 1e-4  # weight of the KL of an image with R = 0


def make(
    levels: int = 20,
    beta: float = 1.0,
    advantage_clip: float = 5.0,
    center: str = "update",
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
      kl_beta: weight of the squared distance to the velocity before training, of an image with
        R = 1; 0 spares its forward pass.
      old_first, old_rate, old_most: after n optimiser steps "old" keeps
        min(old_first + n x old_rate, old_most) of itself at the end of an epoch. These defaults are
        the paper's for rendered text; Flow-Factory's general ones are 0.25, 1e-3 and 0.5.
      drawer_flat, drawer_rate, drawer_most: the same for "drawer", which keeps
        min(max(n - drawer_flat, 0) x drawer_rate, drawer_most).
    """
    _check(levels, beta, advantage_clip, center, (old_first, old_most, drawer_most))

    def loss(
        setup: Setup,
        v: Velocities,
        rollout: Rollout,
        term: jax.Array,
        advantage: jax.Array,
    ) -> tuple[jax.Array, Figures]:
        sigma = jnp.asarray(setup.process.sigmas, jnp.float32)[term % setup.process.steps]
        noised = renoise(rollout, jnp.broadcast_to(sigma, rollout.prompt.shape), term)
        velocity, old = (v[name](noised.x, noised.sigma) for name in ("policy", "old"))
        errors = [normalised_velocity_error(u, noised) for u in (old, velocity)]
        implicit = errors[0] - errors[1]
        reward = jnp.clip(advantage_of(advantage, term) / (2 * advantage_clip) + 0.5, 0, 1)
        size = setup.group_size if center == "group" else len(reward)
        gap = beta * _centred(implicit, size) - _centred(reward, size)
        value = jnp.square(gap) * advantage_clip / beta
        to_reference = distance(v, "reference", kl_beta, velocity, noised)
        figures = {
            "policy_loss": value,
            "kl": to_reference,
            "old_distance": mean(jnp.square(velocity - old)),
        }
        least = min(LEAST_KL, kl_beta)  # kl_beta x m
        return value + (least + reward * (kl_beta - least)) * to_reference, figures

    return Algorithm(
        loss,
        terms=lambda setup, key: jnp.arange(levels),
        figures=("policy_loss", "kl", "old_distance"),
        draws="drawer",
        reads=("old", "reference") if kl_beta else ("old",),
        copies={
            "old": copies.rising(old_rate, old_most, first=old_first),
            "drawer": copies.rising(drawer_rate, drawer_most, flat=drawer_flat),
        },
        whole=center,
        summary=f"CRD, {levels} noise levels an image, centred over the {center}, KL {kl_beta:g}",
    )


def _centred(x: jax.Array, size: int) -> jax.Array:
    """Subtract from x [M] the mean of every `size` values in a row, as a constant."""
    means = jax.lax.stop_gradient(x.reshape(-1, size).mean(1))
    return x - jnp.repeat(means, size)


def _check(
    levels: int, beta: float, advantage_clip: float, center: str, kept: tuple[float, ...]
) -> None:
    for name, value in {"levels": levels, "beta": beta, "advantage_clip": advantage_clip}.items():
        if not value > 0:
            raise ValueError(f"algorithm.options.{name}={value}: must be above 0")
    if center not in ("update", "group"):
        raise ValueError(f"algorithm.options.center={center!r}: choose from 'update', 'group'")
    for name, value in zip(("old_first", "old_most", "drawer_most"), kept):
        if not 0 <= value < 1:
            raise ValueError(f"algorithm.options.{name}={value}: must be in [0, 1)")
