"""Advantage-weighted matching: the flow-matching loss of an image, weighted by its advantage.

Source: AWM (arXiv 2509.25050) and the constants of scxue/advantage_weighted_matching. The error of
the velocity at a noised image, l = |v - (noise - x_0)|^2, stands for a log-prob,

    log p = -sigma ((l + e)^p - e^p) / p,   p = 1/4, e = 1e-10,

which a clipped policy gradient raises for good images. Two squared distances hold the policy back:
to the velocity before training, and to a fast average of the policy, "anchor".

The published recipes make one update an epoch, so that the old log-prob is the policy's own and the
ratio is 1. That is `clip_range=0`, the default, which spares the forward pass of the old policy;
with several updates an epoch choose a clip range.

Deviations from the published code: the rollout's solver is `sample.solver`, in place of SA-Solver,
whose noise of 0.4 at sigma between 0.3 and 0.9 (GenEval and rendered text) is left out; levels are
drawn for each image, and not for a micro-batch; errors are f32 in place of f64.
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
    used,
)
from flowgrpo_jax.algorithms.matching import distance, velocity_error
from flowgrpo_jax.algorithms.renoise import Renoised, renoise_stratum, stratified
from flowgrpo_jax.algorithms.trust_regions import clipped
from flowgrpo_jax.types import Credit, Rollout

TINY = 1e-10


def make(
    levels: int = 6,
    first: int = 1,
    share: float = 0.9,
    power: float = 0.25,
    advantage_scale: float = 0.2,
    clip_range: float = 0.0,
    kl_beta: float = 3e-3,
    anchor_beta: float = 1.0,
    anchor_rate: float = 1e-3,
    anchor_most: float = 0.3,
) -> Algorithm:
    """
    Args:
      levels: noise levels of an image an update, each drawn from its own part of the rollout's
        steps.
      first, share: the steps begin with this one, counted from 0, and end before `share` of them
        all. The published recipes have 1 and 0.9, that of PickScore 0 and 0.9.
      power: of the error, p above.
      advantage_scale: what advantages are multiplied by.
      clip_range: of the ratio to the policy that drew the images; 0 means the ratio is 1.
      kl_beta: weight of the squared distance to the velocity before training. The published
        recipes have 3e-3, that of PickScore 1e-4.
      anchor_beta: weight of the squared distance to the anchor, which keeps
        min(anchor_rate x optimiser steps, anchor_most) of itself at the end of an epoch.
    """
    options.at_least(1, levels=levels)
    options.positive(share=share, power=power)
    options.at_most(1, share=share)
    options.at_least(0, first=first, advantage_scale=advantage_scale, clip_range=clip_range)
    options.at_least(0, kl_beta=kl_beta, anchor_beta=anchor_beta, anchor_rate=anchor_rate)
    options.below_one(anchor_most=anchor_most)

    reads = used(old=clip_range, anchor=anchor_beta, reference=kl_beta)
    decays = {"old": copies.fresh, "anchor": copies.rising(anchor_rate, anchor_most)}
    return Algorithm(
        partial(
            _loss,
            levels=levels,
            first=first,
            share=share,
            power=power,
            advantage_scale=advantage_scale,
            clip_range=clip_range,
            kl_beta=kl_beta,
            anchor_beta=anchor_beta,
        ),
        terms=stratified(levels, first=first, share=share),
        figures=("policy_loss", "kl", "anchor_distance", "ratio_gap"),
        reads=reads,
        copies={name: decay for name, decay in decays.items() if name in reads},
        weighs_kl=kl_beta > 0,
        worst=("ratio_gap",),
        summary=f"AWM, {levels} noise levels an image, KL {kl_beta:g}, anchor {anchor_beta:g}",
    )


def _loss(
    setup: Setup,
    v: Velocities,
    rollout: Rollout,
    term: jax.Array,
    credit: Credit,
    *,
    levels: int,
    first: int,
    share: float,
    power: float,
    advantage_scale: float,
    clip_range: float,
    kl_beta: float,
    anchor_beta: float,
) -> tuple[jax.Array, Figures]:
    """Return the loss [M] of images at levels from part `term` of the steps, and its figures."""
    noised = renoise_stratum(setup, rollout, term, levels, first=first, share=share)
    velocity = v["policy"](noised.x, noised.sigma)
    new = log_prob(velocity, noised, power)
    old = jax.lax.stop_gradient(new)
    if clip_range:
        old = log_prob(v["old"](noised.x, noised.sigma), noised, power)
    weight = advantage_scale * credit.advantage
    value, ratio = clipped(new - old, weight, clip_range or jnp.inf)
    to_anchor = distance(v, "anchor", anchor_beta, velocity, noised)
    to_reference = distance(v, "reference", kl_beta, velocity, noised)
    figures = {
        "policy_loss": value,
        "kl": to_reference,
        "anchor_distance": to_anchor,
        "ratio_gap": jnp.abs(ratio - 1),
    }
    held = kl_beta * credit.weigh(to_reference)
    return value + held + anchor_beta * to_anchor, figures


def log_prob(velocity: jax.Array, noised: Renoised, power: float) -> jax.Array:
    """Return what stands for the log-prob of M images, f32 [M]: the equation at the top."""
    error = velocity_error(velocity, noised)
    return -noised.sigma * ((error + TINY) ** power - TINY**power) / power
