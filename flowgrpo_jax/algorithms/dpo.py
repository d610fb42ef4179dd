"""Online Diffusion-DPO: the best image of a group is preferred to the worst.

Source: Diffusion-DPO (arXiv 2311.12908), in the form for flows of flow_grpo's
scripts/train_sd3_dpo.py. With the error l = |v - Y|^2 and the reference's l_ref, and with noise and
level in common,

    loss = -log sigmoid(-beta / 2 ((l - l_ref) of the best - (l - l_ref) of the worst)).

Deviations: a pair takes the places of its whole group, so that it is seen with G / 2 draws of noise
at once; the noise level is an index into the rollout's schedule, and not into one of 1,000 steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Figures, Setup, Velocities, copies, options
from flowgrpo_jax.algorithms.matching import velocity_error
from flowgrpo_jax.algorithms.renoise import mean, renoise_logit_normal, share_keys
from flowgrpo_jax.algorithms.selection import best_and_worst
from flowgrpo_jax.types import Credit, Rollout


def make(beta: float = 100.0, levels: int = 1, reset_every: int = 0) -> Algorithm:
    """
    Args:
      beta: how strongly the policy is held to the reference; flow_grpo has 100, Diffusion-DPO
        2,000 to 5,000.
      levels: draws of noise for each place an update; a pair has G / 2 places.
      reset_every: optimiser steps after which the policy becomes its own reference, at the end of
        an epoch; 0 means never.
    """
    options.positive(beta=beta)
    options.at_least(1, levels=levels)
    options.at_least(0, reset_every=reset_every, meaning="never")

    def loss(
        setup: Setup,
        v: Velocities,
        rollout: Rollout,
        term: jax.Array,
        credit: Credit,
    ) -> tuple[jax.Array, Figures]:
        a = credit.advantage
        pairs, weight = best_and_worst(rollout, a, setup.group_size)
        noised = renoise_logit_normal(setup, share_keys(pairs, 2), term)
        velocity, reference = (v[name](noised.x, noised.sigma) for name in ("policy", "reference"))
        gain = velocity_error(velocity, noised) - velocity_error(reference, noised)
        margin = jnp.repeat(gain[0::2] - gain[1::2], 2)
        value = weight * jax.nn.softplus(beta / 2 * margin)
        figures = {
            "policy_loss": value,
            "kl": mean(jnp.square(velocity - reference)),
            "pair_accuracy": weight * (margin < 0),
        }
        return value, figures

    def terms(setup: Setup, key: jax.Array) -> jax.Array:
        if setup.group_size % 2:
            raise ValueError(
                f"sample.group_size={setup.group_size}: dpo fills a group with pairs; choose an"
                " even number"
            )
        return jnp.arange(levels)

    return Algorithm(
        loss,
        terms,
        figures=("policy_loss", "kl", "pair_accuracy"),
        reads=("reference",),
        copies={"reference": copies.reset(reset_every)} if reset_every else {},
        whole="group",
        summary=f"online DPO, best against worst of a group, beta {beta:g}",
    )
