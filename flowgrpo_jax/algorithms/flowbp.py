"""FlowBP-Sparse: the gradient of the reward through a few velocities of the rollout, one by one.

Source: FlowBP (arXiv 2606.11075), in the form of RuoyuWang-2077/FlowBP
(trainers/sd35/flowbp_sparse.py, configs/final/sd35). The image is the sum of the rollout's steps,
x_0 = x_T + sum of (sigma' - sigma) v. Of these velocities K are computed once more from the
recorded latents, with a gradient to the weights but none to the latents,

    x_hat = x_0 + g sum over the K steps of (sigma' - sigma) (v - sg v),      sg: stop-gradient
    loss  = max(threshold - reward(x_hat), 0)
    g     = 1 + rescale (sum of all |sigma' - sigma| / that of the K steps - 1)

so that the reward sees the very image x_0 of the rollout. The K steps are drawn for an epoch,
without replacement, step i with a probability in proportion to (i + 1)^late_bias.

FlowBP has a threshold of 0.55 for HPSv2. Bridge and Lagrange, its other two schemes, are not here.

Deviation: x_hat is centred at the rollout's image, and not at the sum of its steps in f32, which is
the same but for rounding, and is what their residual term restores as well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Score, Setup, Velocities, options
from flowgrpo_jax.algorithms.reward_gradients import (
    algorithm,
    check_euler,
)
from flowgrpo_jax.types import Rollout


def make(
    active: int = 4, late_bias: float = 1.0, rescale: float = 0.5, threshold: float = jnp.inf
) -> Algorithm:
    """
    Args:
      active: K, the steps with a gradient.
      late_bias: how much more often late steps are drawn; 0 means all alike.
      rescale: how far the gradient makes up for the steps that are left out, 0 to 1.
      threshold: reward from which on nothing is learned; inf means none.
    """
    options.at_least(1, active=active)
    options.at_least(0, late_bias=late_bias)
    if not 0 <= rescale <= 1:
        raise ValueError(
            f"algorithm.options.rescale={rescale}: must be in [0, 1], from no steps that are left"
            " out to all of them"
        )

    def rewarded(
        setup: Setup, v: Velocities, rollout: Rollout, term: jax.Array, score: Score
    ) -> jax.Array:
        sigmas = jnp.asarray(setup.process.sigmas, jnp.float32)
        lengths = sigmas[1:] - sigmas[:-1]
        steps = draw_steps(term, setup.process.steps, active, late_bias)
        gain = 1 + rescale * (lengths.sum() / lengths[steps].sum() - 1)

        @jax.checkpoint
        def add(moved: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
            velocity = v["policy"](rollout.x[step], sigmas[step])
            change = velocity - jax.lax.stop_gradient(velocity)
            return moved + gain * lengths[step] * change, None

        x_hat, _ = jax.lax.scan(add, rollout.latents, steps)
        return score(x_hat)[0]

    def terms(setup: Setup, key: jax.Array) -> jax.Array:
        """One term: the seed that the steps are drawn with."""
        check_euler(setup, "flowbp")
        if active > setup.process.steps:
            raise ValueError(
                f"algorithm.options.active={active}: a rollout has {setup.process.steps} steps"
                " (sample.steps); choose at most as many"
            )
        return jax.random.randint(key, (1,), 0, 2**31 - 1)

    summary = f"FlowBP-Sparse, {active} steps"
    return algorithm(rewarded, terms, threshold, summary, passes=lambda setup: active)


def draw_steps(seed: jax.Array, steps: int, active: int, late_bias: float) -> jax.Array:
    """Draw `active` of the steps without replacement, i32 [K], in order.

    The largest of log-weights with Gumbel noise are a draw without replacement.
    """
    noise = jax.random.gumbel(jax.random.key(seed), (steps,))
    scores = late_bias * jnp.log(jnp.arange(steps) + 1.0) + noise
    return jnp.sort(jax.lax.top_k(scores, active)[1])
