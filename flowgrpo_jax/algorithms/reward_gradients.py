"""Shared functions of algorithms that differentiate the reward: ReFL, DRaFT, FlowBP, SRPO.

They have no policy gradient and read no advantage: the loss is the reward itself, of images that
are a differentiable function of the policy's weights at some steps of its rollout. The rollout by
the plain ODE is recorded without a gradient. With several updates an epoch the later ones start
from latents that the policy before the epoch's first update drew.

Deviation from RuoyuWang-2077/FlowBP, for its rows: with guidance the branch of the empty prompt is
differentiated like that of the prompt, where theirs is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Figures, Score, Setup, Velocities
from flowgrpo_jax.sampling import solvers
from flowgrpo_jax.types import Credit, Rollout

FIGURES = ("policy_loss", "below_threshold")
# (setup, velocities, rollout, term i32, score) -> f32 [M]: the reward, with its gradient
Rewarded = Callable[[Setup, Velocities, Rollout, jax.Array, Score], jax.Array]


def algorithm(
    rewarded: Rewarded,
    terms: Callable[[Setup, jax.Array], jax.Array],
    threshold: float,
    summary: str,
    **fields: Any,
) -> Algorithm:
    """Return the algorithm that raises a differentiable reward up to a threshold.

    Args:
      terms, fields: as in Algorithm.

    Raises ValueError for a threshold that is no number and not inf.
    """
    if math.isnan(threshold) or threshold == -math.inf:
        raise ValueError(f"algorithm.options.threshold={threshold}: must be a number, or inf")

    def loss(
        setup: Setup,
        v: Velocities,
        rollout: Rollout,
        term: jax.Array,
        credit: Credit,
        score: Score,
    ) -> tuple[jax.Array, Figures]:
        return shortfall(rewarded(setup, v, rollout, term, score), threshold)

    return Algorithm(
        loss,
        terms,
        figures=FIGURES,
        records="path",
        reward_gradient=True,
        summary=f"{summary}, threshold {threshold:g}",
        **fields,
    )


def shortfall(score: jax.Array, threshold: float) -> tuple[jax.Array, Figures]:
    """Return the loss of M scores, and its figures: max(threshold - score, 0) or, where the
    threshold is inf, -score."""
    if math.isinf(threshold):
        return -score, {"policy_loss": -score, "below_threshold": jnp.ones_like(score)}
    value = jax.nn.relu(threshold - score)
    return value, {"policy_loss": value, "below_threshold": (score < threshold).astype(jnp.float32)}


def predicted(x: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """Return the images x_0 = x - sigma v that a velocity at x predicts, with a scalar sigma."""
    return x - sigma * velocity


def check_last(setup: Setup, last: int) -> None:
    """Raise ValueError where a rollout has fewer than `last` steps."""
    if last > setup.process.steps:
        raise ValueError(
            f"algorithm.options.last={last}: a rollout has {setup.process.steps} steps"
            " (sample.steps); choose at most as many"
        )


def check_euler(setup: Setup, name: str) -> None:
    """Raise ValueError for a solver whose steps depend on the steps before."""
    if setup.process.solver is not solvers.EULER:
        raise ValueError(
            f"sample.solver: {name} differentiates single steps of the rollout, which has to take"
            " them by 'euler'"
        )
