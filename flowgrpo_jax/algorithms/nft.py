"""DiffusionNFT: good images pull an implicit positive policy, bad ones push a negative one.

Source: DiffusionNFT (arXiv 2509.16117), equations 7 to 9, and the constants of NVlabs/DiffusionNFT.
It needs no log-probs and no noise in the rollout. The images are drawn by a slow copy of the
policy, "old". With r = clip(A / (2 C) + 1/2, 0, 1), v+ = (1 - beta) v_old + beta v and
v- = (1 + beta) v_old - beta v, and the image that a velocity predicts, x_0(v) = x - sigma v:

    C / beta (r |x_0(v+) - x_0|^2 / w+ + (1 - r) |x_0(v-) - x_0|^2 / w-) + anchor |v - v_ref|^2

where w is the mean absolute error itself, as a constant. The noise levels are those of the
rollout's schedule without the last one.

Deviations from NVlabs/DiffusionNFT: its code drops one level at random for each image, and so
trains the last one in nine of ten images, where this leaves out the last one, whose error counts
least; the rollout's solver is `sample.solver`, Euler's by default; errors are f32 in place of f64.
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
from flowgrpo_jax.algorithms.renoise import mean, renoise
from flowgrpo_jax.types import Credit, Rollout


def make(
    beta: float = 1.0,
    advantage_clip: float = 5.0,
    anchor: float = 1e-4,
    old_flat: int = 0,
    old_rate: float = 1e-3,
    old_most: float = 0.5,
) -> Algorithm:
    """
    Args:
      beta: how far the implicit policies lie from the old one.
      advantage_clip: the advantage C at which an image counts as wholly good; keep it at
        `advantage.clip`.
      anchor: weight of the squared distance to the velocity before training; 0 spares its forward.
      old_flat, old_rate, old_most: after n optimiser steps the old policy keeps
        min(max(n - old_flat, 0) x old_rate, old_most) of itself at the end of an epoch. The paper's
        three schedules are (0, 0, 0), the default, and (75, 0.0075, 0.999).
    """
    options.positive(beta=beta, advantage_clip=advantage_clip)
    options.at_least(0, anchor=anchor, old_flat=old_flat, old_rate=old_rate)
    options.below_one(old_most=old_most)

    def loss(
        setup: Setup,
        v: Velocities,
        rollout: Rollout,
        term: jax.Array,
        credit: Credit,
    ) -> tuple[jax.Array, Figures]:
        sigmas = jnp.asarray(setup.process.sigmas, jnp.float32)
        level = jnp.broadcast_to(sigmas[term], rollout.prompt.shape)
        noised = renoise(rollout, level, term)
        x, sigma, _ = noised
        new, old = v["policy"](x, sigma), v["old"](x, sigma)
        good = jnp.clip(credit.advantage / (2 * advantage_clip) + 0.5, 0, 1)
        positive = image_error((1 - beta) * old + beta * new, x, sigma, rollout.latents)
        negative = image_error((1 + beta) * old - beta * new, x, sigma, rollout.latents)
        value = (good * positive + (1 - good) * negative) * advantage_clip / beta
        to_reference = distance(v, "reference", anchor, new, noised)
        figures = {
            "policy_loss": value,
            "kl": to_reference,
            "old_distance": mean(jnp.square(new - old)),
        }
        return value + anchor * credit.weigh(to_reference), figures

    return Algorithm(
        loss,
        terms=lambda setup, key: jnp.arange(max(setup.process.steps - 1, 1)),
        figures=("policy_loss", "kl", "old_distance"),
        draws="old",
        reads=("old", *used(reference=anchor)),
        copies={"old": copies.rising(old_rate, old_most, flat=old_flat)},
        weighs_kl=anchor > 0,
        summary=f"DiffusionNFT, beta {beta:g}, anchor {anchor:g}, old policy keeps {old_most:g}",
    )
