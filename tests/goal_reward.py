"""A reward that is highest at one picture, and the gradient of an algorithm on it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from linear_policy import IMAGES, SHAPE, draw, gradient_of, linear, setup_of

from flowgrpo_jax import algorithms
from flowgrpo_jax.types import Credit

ROWS = {
    "refl": ("refl", {"last": 5}),
    "draft": ("draft", {"last": 3}),
    "draft_all": ("draft", {"last": 0}),
    "draft_lv": ("draft_lv", {"last": 2}),
    "flowbp": ("flowbp", {}),
    "srpo": ("srpo", {}),
}
NOTHING = Credit(jnp.zeros(IMAGES))  # which nobody reads
GOAL = np.random.default_rng(5).normal(size=SHAPE).astype(np.float32)


def near(x):
    """A reward for each of two texts: minus the squared distances to a picture and its negative."""
    return jnp.stack([-jnp.square(x - goal).sum((1, 2, 3)) for goal in (GOAL, -GOAL)])


def load(case):
    name, options = ROWS[case]
    return algorithms.load(name, options)


def gradient(case, params, rollout, score=near, **more):
    algorithm = load(case) if isinstance(case, str) else case
    setup = setup_of(algorithm)
    return gradient_of(
        algorithm, setup, params, {}, rollout, NOTHING.advantage, score=score, **more
    )


def path(params, seed=0):
    algorithm = load("draft")
    return draw(partial(linear, params), setup_of(algorithm).process, jax.random.key(seed))
