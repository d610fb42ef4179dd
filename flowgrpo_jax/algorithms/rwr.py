"""Reward-weighted regression: the flow-matching error of each image, weighted by its advantage.

Source: reward-weighted regression (Peters and Schaal 2007), in the form of flow_grpo's
scripts/train_sd3_sft.py: w |v - Y|^2 + kl_beta |v - v_ref|^2 with

  exp      w = exp(A / temperature)
  softmax  w = G softmax(A / temperature) within the group, whose mean is 1

Deviations: weights come from advantages, in place of rewards. Within a group that is the same up to
a factor with `advantage.name="none"`, and with "group" the temperature is in units of the group's
spread. The noise level is an index into the rollout's schedule, and not into one of 1,000 steps.

A good image pulls and a bad one pulls less: nothing is pushed away, and equal rewards still train
the images that were drawn. Images without a valid score have A = -inf, and so weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Figures, Setup, Velocities, options, used
from flowgrpo_jax.algorithms.matching import distance, velocity_error
from flowgrpo_jax.algorithms.renoise import Renoised, renoise_logit_normal
from flowgrpo_jax.types import Credit, Rollout

WEIGHTINGS = ("exp", "softmax")


def make(
    temperature: float = 1.0, weighting: str = "exp", levels: int = 1, kl_beta: float = 0.0
) -> Algorithm:
    """
    Args:
      temperature: the smaller, the more the best images count.
      weighting: "exp" or "softmax".
      levels: draws of a noise level and noise for an image an update.
      kl_beta: weight of the squared distance to the velocity before training; 0 spares its forward.
    """
    options.one_of(WEIGHTINGS, weighting=weighting)
    options.at_least(1, levels=levels)
    options.positive(temperature=temperature)
    options.at_least(0, kl_beta=kl_beta)

    def weigh(advantage: jax.Array, group_size: int) -> jax.Array:
        if weighting == "exp":
            return jnp.exp(advantage / temperature)
        shares = jax.nn.softmax(advantage.reshape(-1, group_size) / temperature, axis=1)
        return group_size * jnp.nan_to_num(shares).reshape(-1)  # NaN: no image has a score

    return regression(
        weigh,
        renoise_logit_normal,
        lambda setup, key: jnp.arange(levels),
        kl_beta,
        whole="group" if weighting == "softmax" else "",
        summary=f"RWR, {weighting} weights, temperature {temperature:g}, KL {kl_beta:g}",
    )


def regression(
    weigh: Callable[[jax.Array, int], jax.Array],
    noise: Callable[[Setup, Rollout, jax.Array], Renoised],
    terms: Callable[[Setup, jax.Array], jax.Array],
    kl_beta: float,
    *,
    whole: str,
    summary: str,
) -> Algorithm:
    """Return the algorithm w |v - Y|^2 + kl_beta |v - v_ref|^2.

    Args:
      weigh: (advantage [M], group size) -> w [M]; noise: (setup, rollout, term) -> noised images.
    """

    def loss(
        setup: Setup,
        v: Velocities,
        rollout: Rollout,
        term: jax.Array,
        credit: Credit,
    ) -> tuple[jax.Array, Figures]:
        noised = noise(setup, rollout, term)
        velocity = v["policy"](noised.x, noised.sigma)
        weight = weigh(credit.advantage, setup.group_size)
        value = weight * velocity_error(velocity, noised)
        to_reference = distance(v, "reference", kl_beta, velocity, noised)
        figures = {"policy_loss": value, "kl": to_reference}
        return value + kl_beta * credit.weigh(to_reference), figures

    return Algorithm(
        loss,
        terms,
        figures=("policy_loss", "kl"),
        reads=used(reference=kl_beta),
        whole=whole,
        unscored=-math.inf,
        weighs_kl=kl_beta > 0,
        summary=summary,
    )
