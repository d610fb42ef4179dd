"""V-GRPO: a policy gradient with the error of the predicted image in place of a log-prob.

Source: V-GRPO (arXiv 2604.23380), by secondary texts and the code of guoriyue/VRL; the official
repository could not be read. With L = |x_0(v) - x_0|^2 / w, in which x_0(v) = x - sigma v is the
predicted image and w the mean absolute error as a constant,

    loss = -r A',   r = exp(L_old - L),   A' = soft_clip tanh(A / soft_clip).

The images of a group share noise and levels, which are stratified over the schedule. The first
stage of the paper is strictly on policy: the ratio is 1, without a clip and without a KL. That is
the default here. Re-derived: the gradient of the loss is then A' times that of L, which is
DiffusionNFT's where the old policy is the current one (tests/test_matching.py).

Deviation: where the strata of VRL begin is rounded, and here it is rounded down. It matters where
the levels do not divide the steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import (
    Algorithm,
    Figures,
    Setup,
    Velocities,
    copies,
    options,
    used,
)
from flowgrpo_jax.algorithms.matching import distance, image_error
from flowgrpo_jax.algorithms.renoise import renoise_stratum, share_keys, stratified
from flowgrpo_jax.algorithms.trust_regions import clipped
from flowgrpo_jax.types import Credit, Rollout


def make(
    levels: int = 4, soft_clip: float = 3.0, clip_range: float = 0.0, kl_beta: float = 0.0
) -> Algorithm:
    """
    Args:
      levels: noise levels of an image an update, each drawn from its own part of the schedule. The
        paper finds that two diverge.
      soft_clip: bound of the advantages; 0 leaves them as they are.
      clip_range: of the ratio to the policy that drew the images, 3e-2 in the paper's later stages;
        0 means the ratio is 1.
      kl_beta: weight of the squared distance of the predicted image to that of the policy before
        training, 0.3 where the paper has one.
    """
    options.at_least(1, levels=levels)
    options.at_least(0, soft_clip=soft_clip, clip_range=clip_range, kl_beta=kl_beta)

    def loss(
        setup: Setup,
        v: Velocities,
        rollout: Rollout,
        term: jax.Array,
        credit: Credit,
    ) -> tuple[jax.Array, Figures]:
        shared = share_keys(rollout, setup.group_size)
        noised = renoise_stratum(setup, shared, term, levels, first=0)
        x, sigma, _ = noised
        velocity = v["policy"](x, sigma)
        new = image_error(velocity, x, sigma, rollout.latents)
        old = jax.lax.stop_gradient(new)
        if clip_range:
            old = image_error(v["old"](x, sigma), x, sigma, rollout.latents)
        a = credit.advantage
        a = soft_clip * jnp.tanh(a / soft_clip) if soft_clip else a
        value, ratio = clipped(old - new, a, clip_range or jnp.inf)
        to_reference = jnp.square(sigma) * distance(v, "reference", kl_beta, velocity, noised)
        figures = {
            "policy_loss": value,
            "kl": to_reference,
            "ratio_gap": jnp.abs(ratio - 1),
        }
        return value + kl_beta * credit.weigh(to_reference), figures

    return Algorithm(
        loss,
        terms=stratified(levels, first=0),
        figures=("policy_loss", "kl", "ratio_gap"),
        reads=used(old=clip_range, reference=kl_beta),
        copies={"old": copies.fresh} if clip_range else {},
        whole="group",
        weighs_kl=kl_beta > 0,
        worst=("ratio_gap",),
        summary=f"V-GRPO, {levels} noise levels a group, soft clip {soft_clip:g}, KL {kl_beta:g}",
    )
