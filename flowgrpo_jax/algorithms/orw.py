"""ORW-CFM-W2: exponential weights, and a bound of the Wasserstein-2 distance to the start.

Source: arXiv 2502.06061. Flow matching of the policy's own images, weighted by the reward, with the
squared distance of the velocities, which bounds the distance of what is drawn:

    exp(A / temperature) |v - Y|^2 + alpha |v - v_ref|^2.

Deviations: the weight comes from the advantage, in place of the reward (rwr.py says when that is
the same); the paper's noise level is uniform on [0, 1], and here it is that of a step of the
rollout's schedule, stratified.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, options
from flowgrpo_jax.algorithms.renoise import renoise_stratum, stratified
from flowgrpo_jax.algorithms.rwr import regression


def make(temperature: float = 1.0, alpha: float = 1.0, levels: int = 4) -> Algorithm:
    """
    Args:
      temperature: the smaller, the more the best images count.
      alpha: weight of the distance; 0 spares the reference's forward pass, and the policy may then
        collapse onto a few images.
      levels: noise levels of an image an update, each drawn from its own part of the schedule.
    """
    options.at_least(1, levels=levels)
    options.positive(temperature=temperature)
    options.at_least(0, alpha=alpha)

    return regression(
        lambda advantage, group_size: jnp.exp(advantage / temperature),
        partial(renoise_stratum, levels=levels, first=0),
        stratified(levels, first=0),
        alpha,
        whole="",
        summary=f"ORW-CFM-W2, temperature {temperature:g}, alpha {alpha:g}",
    )
