"""The loss of one term, its gradient, and the errors that it is made of, for a linear policy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from linear_policy import everywhere, finished, linear, matching, setup_of, weights

from flowgrpo_jax import algorithms
from flowgrpo_jax.types import Credit

ADVANTAGE = jnp.array([1.0, -2.0, 0.4, 0.6])  # its mean is 0
STEP = 3
POLICY, REFERENCE, OLD = weights(0), weights(1), weights(2)


def loss_of(algorithm, rollout, params, others, advantage=ADVANTAGE, term=STEP, group_size=1):
    """The loss and figures of one term; without further words every image is its own group."""
    velocities = {name: partial(linear, others[name]) for name in algorithm.reads}
    velocities["policy"] = partial(linear, params)
    setup = setup_of(algorithm, group_size=group_size)
    return algorithm.loss(setup, velocities, rollout, jnp.int32(term), Credit(advantage))


def gradient(name, options, others=None, **given):
    algorithm, rollout = algorithms.load(name, options), finished()
    others = others or everywhere(POLICY)
    return jax.grad(lambda p: loss_of(algorithm, rollout, p, others, **given)[0].sum())(POLICY)


def errors(rollout, params, sigma, term=STEP):
    """|v - Y|^2 and the mean |v - Y| of each image in numpy, f64."""
    target, v, _, _ = matching(rollout, term, jnp.broadcast_to(sigma, rollout.prompt.shape), params)
    return np.square(v - target).mean((1, 2, 3)), np.abs(v - target).mean((1, 2, 3))
