"""DRaFT-LV: DRaFT-1 with several draws of the last step's noise, which lowers its variance.

Source: DRaFT (arXiv 2309.17400), section 4.2, in the form of RuoyuWang-2077/FlowBP
(trainers/sd35/draft_lv.py). The image x_0 is noised again to the level sigma of the last step, with
fresh noise each time, and predicted from there,

    loss = mean over the last latents and n noised ones, x, of -reward(x - sigma v(x, sigma))

Each is a term of its own, so that memory does not grow with n. On diffusers' schedule of SD3 the
last step begins at sigma = 0.009, where all of them are almost the same picture: `last=2` takes the
step before it.

Deviation: x_0 is the image of the rollout, which is the policy's own prediction in an epoch's first
update and before it lags behind by the updates since.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Score, Setup, Velocities, options
from flowgrpo_jax.algorithms.renoise import renoise
from flowgrpo_jax.algorithms.reward_gradients import (
    algorithm,
    check_last,
    predicted,
)
from flowgrpo_jax.types import Rollout


def make(noised: int = 2, last: int = 1, threshold: float = jnp.inf) -> Algorithm:
    """
    Args:
      noised: n, the copies that are noised again; 0 is DRaFT-1.
      last: the step, counted from the rollout's end.
      threshold: reward from which on nothing is learned; inf means none, as in the paper.
    """
    options.at_least(0, noised=noised)
    options.at_least(1, last=last)

    def rewarded(
        setup: Setup, v: Velocities, rollout: Rollout, term: jax.Array, score: Score
    ) -> jax.Array:
        step = setup.process.steps - last
        sigma = jnp.float32(setup.process.sigmas[step])
        level = jnp.broadcast_to(sigma, rollout.prompt.shape)
        x = jnp.where(term == 0, rollout.x[step], renoise(rollout, level, term).x)
        return score(predicted(x, v["policy"](x, sigma), sigma))[0]

    def terms(setup: Setup, key: jax.Array) -> jax.Array:
        check_last(setup, last)
        return jnp.arange(noised + 1)

    return algorithm(rewarded, terms, threshold, f"DRaFT-LV, {noised} noised copies")
