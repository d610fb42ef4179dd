"""DRaFT-K: the gradient of the reward through the last K steps of the rollout.

Source: DRaFT (arXiv 2309.17400), algorithm 1; AlignProp (2310.03739) is the same with K drawn anew
each time. The last K Euler steps are taken once more from the recorded latents, with a gradient
through all of them and through the latents between,

    loss = -reward(x_0)

K = 1 is ReFL at the rollout's last step; with all steps it is the gradient of the whole ODE. The
velocities are computed once more in the backward pass, step by step, so that memory does not grow
with K but for the latents.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Score, Setup, Velocities, options
from flowgrpo_jax.algorithms.reward_gradients import (
    algorithm,
    check_euler,
    check_last,
)
from flowgrpo_jax.sampling import sde
from flowgrpo_jax.types import Rollout


def make(last: int = 1, threshold: float = jnp.inf) -> Algorithm:
    """
    Args:
      last: K, the steps at the end of the rollout that are differentiated; 0 means all.
      threshold: reward from which on nothing is learned; inf means none, as in the paper.
    """
    options.at_least(0, last=last, meaning="all steps")

    def rewarded(
        setup: Setup, v: Velocities, rollout: Rollout, term: jax.Array, score: Score
    ) -> jax.Array:
        sigmas = jnp.asarray(setup.process.sigmas, jnp.float32)
        first = setup.process.steps - (last or setup.process.steps)

        @jax.checkpoint
        def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            sigma, sigma_next = pair
            return sde.euler(x, v["policy"](x, sigma), sigma, sigma_next), None

        x_0, _ = jax.lax.scan(step, rollout.x[first], (sigmas[first:-1], sigmas[first + 1 :]))
        return score(x_0)[0]

    def terms(setup: Setup, key: jax.Array) -> jax.Array:
        check_last(setup, last)
        check_euler(setup, "draft")
        return jnp.zeros(1, jnp.int32)  # one look at a rollout

    return algorithm(
        rewarded,
        terms,
        threshold,
        f"DRaFT through {f'the last {last}' if last else 'all'} steps",
        passes=lambda setup: last or setup.process.steps,
    )
