"""Algorithms that renoise finished images, NFT and AWM, against finite differences and by hand."""

import itertools
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import (
    ADVANTAGE,
    SIGMAS,
    everywhere,
    finished,
    flat,
    gradient_of,
    linear,
    matching,
    setup_of,
    unflat,
    weights,
)
from scipy.optimize import approx_fprime

from flowgrpo_jax import algorithms
from flowgrpo_jax.algorithms import renoise
from flowgrpo_jax.types import Credit


def test_renoised_images_lie_between_the_image_and_the_noise():
    rollout, sigma = finished(), jnp.array([0.0, 0.25, 0.5, 1.0])
    x, _, target = renoise.renoise(rollout, sigma, 3)
    noise = target + rollout.latents
    s = np.reshape(sigma, (-1, 1, 1, 1))
    np.testing.assert_allclose(x, (1 - s) * rollout.latents + s * noise, atol=1e-6)
    other = renoise.renoise(rollout, sigma, 4).target + rollout.latents
    assert np.abs(np.corrcoef(np.ravel(noise), np.ravel(other))[0, 1]) < 0.5


@pytest.mark.parametrize("low, high, terms", [(1, 12, 6), (0, 12, 6), (0, 20, 4), (0, 10, 3)])
def test_strata_begin_at_whole_steps(low, high, terms):
    """As AWM's code has them: floors of equal distances, drawn evenly between them."""
    bounds = np.floor(np.linspace(low, high, terms + 1)).astype(int)
    rollout = finished(3000)
    for k, (begin, end) in enumerate(itertools.pairwise(bounds)):
        counts = np.bincount(renoise.stratum(rollout, jnp.int32(k), terms, low, high))
        assert len(counts) == end and not counts[:begin].any()
        np.testing.assert_allclose(counts[begin:], 3000 / (end - begin), rtol=0.15)


def test_the_steps_that_awm_trains():
    """The published recipes: of 14 steps {1}, {2, 3}, ..., {10, 11}; PickScore's from step 0."""
    setup = setup_of(algorithms.load("awm", {}), sigmas=tuple(np.linspace(1, 0, 15)))
    assert renoise.strata(setup, 6, share=0.9) == (1, 12)
    assert renoise.strata(setup, 6, first=0, share=0.9) == (0, 12)
    assert renoise.strata(setup, 4, first=0) == (0, 14)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_on_policy_is_the_normalised_error_times_the_advantage(beta):
    """With old = current and |A| <= C the gradient is A d[|x_0(v) - x_0|^2 / w], whatever beta and
    C are: an identity between the methods, checked by finite differences in numpy."""
    advantage = np.array([1.0, -2.0, 0.5, -0.3])
    algorithm, rollout, params = algorithms.load("nft", {"beta": beta}), finished(), weights(0)
    setup = setup_of(algorithm)
    terms = range(setup.process.steps - 1)

    def error(theta, sizes=None):
        total, new = 0.0, []
        for k in terms:
            sigma = jnp.full(4, SIGMAS[k])
            target, v, _, s = matching(rollout, k, sigma, unflat(theta))
            miss = s * (target - v)  # of the image that the velocity predicts
            new.append(np.abs(miss).mean((1, 2, 3)))
            size = sizes[k] if sizes else new[-1]
            total += np.sum(advantage * np.square(miss).mean((1, 2, 3)) / size)
        return total / (4 * len(terms)), new

    theta = flat(params).astype(np.float64)
    sizes = error(theta)[1]
    wanted = approx_fprime(theta, lambda t: error(t, sizes)[0], 1e-6)
    found, _ = gradient_of(
        algorithm, setup, params, everywhere(params), rollout, jnp.asarray(advantage, jnp.float32)
    )
    np.testing.assert_allclose(flat(found), wanted, rtol=2e-3, atol=2e-4)


def test_nft_learns_from_the_positive_policy_alone_where_the_advantage_is_full():
    """At A = C the weight of the negative policy is 0: v+ = v with beta = 1, so that the loss is
    C |x_0(v) - x_0|^2 / w, wherever the old policy is."""
    algorithm, rollout = algorithms.load("nft", {"anchor": 0.0}), finished()
    setup, params = setup_of(algorithm), weights(0)
    velocities = {"policy": partial(linear, params), "old": partial(linear, weights(1, 9.0))}
    loss, _ = algorithm.loss(setup, velocities, rollout, jnp.int32(2), Credit(jnp.full(4, 5.0)))
    target, v, _, s = matching(rollout, 2, jnp.full(4, SIGMAS[2]), params)
    miss = s * (target - v)
    wanted = 5 * np.square(miss).mean((1, 2, 3)) / np.abs(miss).mean((1, 2, 3))
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)


def test_awm_is_the_weighted_error_by_finite_differences():
    options = {"levels": 3, "kl_beta": 0.25, "anchor_beta": 0.5}
    algorithm, rollout, params = algorithms.load("awm", options), finished(), weights(0)
    setup, reference, anchor = setup_of(algorithm), weights(1), weights(2)
    advantage = np.array([1.0, -2.0, 0.5, -0.3])

    def loss(theta):
        total = 0.0
        for k in range(3):
            step = renoise.stratum(rollout, k, 3, 1, 7)  # 90 % of eight steps, less the first
            sigma = jnp.asarray(SIGMAS)[step]
            target, v, x, s = matching(rollout, k, sigma, unflat(theta))
            error = np.square(v - target).mean((1, 2, 3))
            score = -s.ravel() * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25
            total -= np.sum(advantage / 5 * score)
            for other, beta in ((reference, 0.25), (anchor, 0.5)):
                w, b = (np.asarray(other[name], np.float64) for name in "wb")
                total += beta * np.sum(np.square(v - (x @ w + s * b)).mean((1, 2, 3)))
        return total / 12

    theta = flat(params).astype(np.float64)
    others = {"reference": reference, "anchor": anchor}
    found, figures = gradient_of(
        algorithm, setup, params, others, rollout, jnp.asarray(advantage, jnp.float32)
    )
    np.testing.assert_allclose(flat(found), approx_fprime(theta, loss, 1e-6), rtol=2e-3, atol=1e-4)
    assert figures["ratio_gap"] == 0


def test_awm_with_a_clip_compares_with_the_policy_that_drew():
    algorithm = algorithms.load("awm", {"levels": 3, "clip_range": 0.1, "anchor_beta": 0.0})
    assert set(algorithm.reads) == {"old", "reference"} and set(algorithm.copies) == {"old"}
    setup, rollout, params = setup_of(algorithm), finished(), weights(0)
    on = gradient_of(algorithm, setup, params, everywhere(params), rollout, ADVANTAGE[:4])[1]
    off = gradient_of(algorithm, setup, params, everywhere(weights(1)), rollout, ADVANTAGE[:4])[1]
    assert on["ratio_gap"] < 1e-6 and off["ratio_gap"] > 0.01
