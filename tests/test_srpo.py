"""SRPO: the image that one step recovers, and the contrast of two texts."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from goal_reward import NOTHING, path
from linear_policy import IMAGES, linear, setup_of, weights

from flowgrpo_jax import algorithms
from flowgrpo_jax.algorithms import srpo


def test_one_step_recovers_the_image_of_an_exact_velocity():
    """And any other velocity v moves it by (s - u) (v - (noise - image)) / (1 - s)."""
    rollout = path(weights(0))
    true = rollout.x[0] - rollout.latents
    for u, s in ((0.8, 0.6), (0.3, 0.6)):
        begin, end = jnp.full(IMAGES, u), jnp.full(IMAGES, s)
        image = srpo.recovered({"policy": lambda x, level: true}, rollout, begin, end)
        np.testing.assert_allclose(image, rollout.latents, atol=1e-5)
        moved = srpo.recovered({"policy": lambda x, level: true + 1}, rollout, begin, end)
        np.testing.assert_allclose(moved - image, (s - u) / (1 - s), atol=1e-5)


def test_the_contrast_is_swapped_in_the_inversion():
    """Of constant scores 2 and 1: (1 + k) 2 - 1 = 1 + 2 k and (1 + k) 1 - 2 = k - 1."""
    algorithm, rollout = algorithms.load("srpo", {"levels": 1}), path(weights(0))
    setup = setup_of(algorithm)
    assert algorithm.texts == ("Natural-lighting. {}", "Painting. {}")

    def score(x):
        return jnp.stack([jnp.full(IMAGES, 2.0), jnp.full(IMAGES, 1.0)])

    args = (setup, {"policy": partial(linear, weights(0))}, rollout)
    losses = [algorithm.loss(*args, jnp.int32(term), NOTHING, score)[0] for term in (0, 1)]
    contrast, swapped = -np.asarray(losses)
    assert ((contrast > 1 + 2 * 0.1) & (contrast < 1 + 2 * 0.25)).all()
    assert ((swapped > 0.01 - 1) & (swapped < 0.3 - 1)).all()
    # Where there is more noise, one k is larger and the other one smaller.
    share = ((contrast - 1) / 2 - 0.1) / 0.15
    np.testing.assert_allclose(swapped + 1, 0.3 - 0.29 * share, rtol=1e-4)


def test_words_with_braces_stand_for_themselves():
    (text, _) = algorithms.load("srpo", {"good": "{a}"}).texts
    assert text.format("a cat") == "{a}. a cat"
