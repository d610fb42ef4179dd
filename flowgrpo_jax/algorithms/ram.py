"""Reinforce adjoint matching: the target of the velocity, moved by the reward.

Source: RAM (arXiv 2605.10759), by secondary texts. At a noised image, with Y = noise - x_0,

    loss = |v - constant(v_ref + scale A (Y - v))|^2,

v_ref being the velocity before training. Re-derived: its gradient is
2 (v - v_ref) dv + scale A 2 (v - Y) dv, that is that of |v - v_ref|^2 + scale A |v - Y|^2. So RAM
is AWM with the power 1, without AWM's weight sigma, and with a KL weight of 1 / scale
(tests/test_matching.py).

Deviation: the noise levels are AWM's, stratified from the second step to `share` of all steps;
the texts say only that there are several.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Figures, Setup, Velocities, options
from flowgrpo_jax.algorithms.renoise import mean, renoise_stratum, spread, stratified
from flowgrpo_jax.types import Credit, Rollout


def make(levels: int = 4, share: float = 0.9, scale: float = 1.0) -> Algorithm:
    """
    Args:
      levels: noise levels of an image an update. Each is drawn from its own part of the rollout's
        steps, from the second one to the end of `share` of them all.
      scale: what advantages are multiplied by: the larger, the further the policy may go.
    """
    options.at_least(1, levels=levels)
    options.positive(share=share, scale=scale)
    options.at_most(1, share=share)

    def loss(
        setup: Setup,
        v: Velocities,
        rollout: Rollout,
        term: jax.Array,
        credit: Credit,
    ) -> tuple[jax.Array, Figures]:
        x, sigma, target = renoise_stratum(setup, rollout, term, levels, share=share)
        velocity, reference = v["policy"](x, sigma), v["reference"](x, sigma)
        to_reference = mean(jnp.square(velocity - reference))
        push = spread(scale * credit.advantage, x) * (target - velocity)
        if credit.kl is not None:  # w |v - v_ref|^2 in place of |v - v_ref|^2
            reference += spread(1 - credit.kl, x) * (velocity - reference)
        moved = jax.lax.stop_gradient(reference + push)
        value = mean(jnp.square(velocity - moved))
        figures = {"policy_loss": value, "kl": to_reference}
        return value, figures

    return Algorithm(
        loss,
        terms=stratified(levels, share=share),
        figures=("policy_loss", "kl"),
        reads=("reference",),
        weighs_kl=True,
        summary=f"RAM, {levels} noise levels an image, scale {scale:g}",
    )
