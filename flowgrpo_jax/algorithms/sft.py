"""Supervised fine-tuning on the best image of each group.

Source: the online variant of flow_grpo's scripts/train_sd3_sft.py: the flow-matching error
|v - Y|^2 of the best image, and kl_beta |v - v_ref|^2.

Deviations: the best image takes the places of its whole group, so that it is seen with G draws of
noise at once, and `kl_beta` weighs 1 / G of what it does in flow_grpo; groups without spread have
no best image, and teach nothing, where flow_grpo trains all of their images; the noise level is an
index into the rollout's schedule, and not into one of 1,000 steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Figures, Setup, Velocities, options, used
from flowgrpo_jax.algorithms.matching import distance, velocity_error
from flowgrpo_jax.algorithms.renoise import renoise_logit_normal
from flowgrpo_jax.algorithms.selection import best
from flowgrpo_jax.types import Credit, Rollout


def make(levels: int = 1, kl_beta: float = 0.0) -> Algorithm:
    """
    Args:
      levels: draws of noise for each place an update; the best image has G places.
      kl_beta: weight of the squared distance to the velocity before training; 0 spares its forward.
    """
    options.at_least(1, levels=levels)
    options.at_least(0, kl_beta=kl_beta)

    def loss(
        setup: Setup,
        v: Velocities,
        rollout: Rollout,
        term: jax.Array,
        credit: Credit,
    ) -> tuple[jax.Array, Figures]:
        chosen, weight = best(rollout, credit.advantage, setup.group_size)
        noised = renoise_logit_normal(setup, chosen, term)
        velocity = v["policy"](noised.x, noised.sigma)
        value = weight * velocity_error(velocity, noised)
        to_reference = distance(v, "reference", kl_beta, velocity, noised)
        figures = {"policy_loss": value, "kl": to_reference}
        return value + kl_beta * credit.weigh(to_reference), figures

    return Algorithm(
        loss,
        terms=lambda setup, key: jnp.arange(levels),
        figures=("policy_loss", "kl"),
        reads=used(reference=kl_beta),
        whole="group",
        weighs_kl=kl_beta > 0,
        summary=f"fine-tuning on the best of each group, KL {kl_beta:g}",
    )
