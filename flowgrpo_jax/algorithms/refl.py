"""ReFL: the gradient of the reward through one late step of the rollout.

Source: Reward Feedback Learning (ImageReward, arXiv 2304.05977, algorithm 1), with the constants of
RuoyuWang-2077/FlowBP (trainers/sd35/refl.py). One step among the last ones is drawn for an epoch.
There the policy predicts the image, x_0 = x - sigma v(x, sigma), and

    loss = max(threshold - reward(x_0), 0)

The latents x were drawn without a gradient. ImageReward's authors have a threshold of 2 for
ImageReward, and steps 30 to 39 of 40; FlowBP has 0.55 for HPSv2 and the last 11 of 25 steps.

Deviations: no factor 1e-3, which AdamW takes out; no loss on data beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Score, Setup, Velocities, options
from flowgrpo_jax.algorithms.reward_gradients import (
    algorithm,
    check_last,
    predicted,
)
from flowgrpo_jax.types import Rollout


def make(last: int = 11, threshold: float = jnp.inf) -> Algorithm:
    """
    Args:
      last: the step is one of so many at the end of the rollout.
      threshold: reward from which on nothing is learned; inf means none.
    """
    options.at_least(1, last=last)

    def rewarded(
        setup: Setup, v: Velocities, rollout: Rollout, term: jax.Array, score: Score
    ) -> jax.Array:
        x, sigma = rollout.x[term], jnp.asarray(setup.process.sigmas, jnp.float32)[term]
        return score(predicted(x, v["policy"](x, sigma), sigma))[0]

    def terms(setup: Setup, key: jax.Array) -> jax.Array:
        check_last(setup, last)
        return setup.process.steps - jax.random.randint(key, (1,), 1, last + 1)

    return algorithm(rewarded, terms, threshold, f"ReFL, one of the last {last} steps")
