"""DGPO: the policy prefers the better half of a group, by the errors of its velocity.

Source: DGPO (arXiv 2510.08425) and the constants of Luo-Yihong/DGPO (config/dgpo.py). The images of
a group share noise and level. With the error d = |v - Y|^2 and the reference's d_ref,

    w = sigmoid(beta / G sum over the group of A (d - d_ref)),
    loss = w A d + kl_beta |v - v_ref|^2

where w is a constant: it falls to 0 once the group is told apart. A PPO-like clip, on the ratio
exp(d_old - d) to a fast average of the policy, "average", stops the gradient of d and keeps its
value. The noise levels are drawn once an epoch, the same for everybody, from the first steps.

Deviations from the published code: the average moves at the end of an epoch, and not at every
optimiser step; the images are drawn by it from `average_after` on, and the copy that draws them
lags behind by at most `average_most`; the reference has the guidance of the rollout, also where
theirs has 4.5 beside a policy without.
"""

from __future__ import annotations

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
    trust_regions,
)
from flowgrpo_jax.algorithms.matching import group_sum, velocity_error
from flowgrpo_jax.algorithms.renoise import mean, renoise, share_keys
from flowgrpo_jax.types import Credit, Rollout


def make(
    levels: int = 4,
    first_steps: int = 7,
    beta: float = 100.0,
    clip_range: float = 1e-2,
    kl_beta: float = 0.02,
    average_rate: float = 1e-3,
    average_most: float = 0.3,
    average_after: int = 200,
) -> Algorithm:
    """
    Args:
      levels: noise levels of an epoch, drawn from those of the first `first_steps` steps. The paper
        has 5 of 10 for GenEval and 7 otherwise.
      beta: how soon a group counts as told apart.
      clip_range: of the ratio to the average; 0 means no clip, and spares the average's forward.
      kl_beta: weight of the squared distance to the velocity before training.
      average_rate, average_most: after n optimiser steps the average keeps
        min(average_rate x n, average_most) of itself at the end of an epoch.
      average_after: optimiser steps after which a copy that moves like the average draws the
        images. The paper has 500 for GenEval and 200 otherwise.
    """
    options.at_least(1, levels=levels)
    options.positive(beta=beta)
    options.at_least(0, clip_range=clip_range, kl_beta=kl_beta)
    options.at_least(0, average_rate=average_rate, average_after=average_after)
    options.below_one(average_most=average_most)
    if first_steps < levels:
        raise ValueError(
            f"algorithm.options.first_steps={first_steps}: must be at least levels={levels}"
        )

    def terms(setup: Setup, key: jax.Array) -> jax.Array:
        if first_steps > setup.process.steps:
            raise ValueError(
                f"algorithm.options.first_steps={first_steps}: a rollout has"
                f" {setup.process.steps} steps (sample.steps); choose at most as many"
            )
        return jnp.sort(jax.random.permutation(key, first_steps)[:levels])

    average = copies.rising(average_rate, average_most)
    moving = {
        "drawer": lambda begun, step: jnp.where(step < average_after, 0.0, average(begun, step)),
        **({"average": average} if clip_range else {}),
    }
    return Algorithm(
        partial(_loss, beta=beta, clip_range=clip_range, kl_beta=kl_beta),
        terms,
        figures=("policy_loss", "kl", "clip_fraction", "group_weight"),
        draws="drawer",
        reads=("reference", "average") if clip_range else ("reference",),
        copies=moving,
        whole="group",
        weighs_kl=kl_beta > 0,
        summary=f"DGPO, {levels} noise levels, beta {beta:g}, KL {kl_beta:g}",
    )


def _loss(
    setup: Setup,
    v: Velocities,
    rollout: Rollout,
    term: jax.Array,
    credit: Credit,
    *,
    beta: float,
    clip_range: float,
    kl_beta: float,
) -> tuple[jax.Array, Figures]:
    """Return the loss [M] of whole groups at the noise level of step `term`, and its figures."""
    size, a = setup.group_size, credit.advantage
    sigma = jnp.asarray(setup.process.sigmas, jnp.float32)[term]
    level = jnp.broadcast_to(sigma, rollout.prompt.shape)
    noised = renoise(share_keys(rollout, size), level, term)
    velocity, reference = (v[name](noised.x, noised.sigma) for name in ("policy", "reference"))
    error = velocity_error(velocity, noised)
    gain = a * (error - velocity_error(reference, noised))
    weight = jax.lax.stop_gradient(jax.nn.sigmoid(beta * group_sum(gain, size) / size))
    outside = jnp.zeros_like(error, bool)
    if clip_range:
        average = velocity_error(v["average"](noised.x, noised.sigma), noised)
        ratio = trust_regions.exp(average - error)
        outside = jnp.where(a > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    value = weight * a * jnp.where(outside, jax.lax.stop_gradient(error), error)
    to_reference = mean(jnp.square(velocity - reference))
    figures = {
        "policy_loss": value,
        "kl": to_reference,
        "clip_fraction": outside.astype(jnp.float32),
        "group_weight": weight,
    }
    return value + kl_beta * credit.weigh(to_reference), figures
