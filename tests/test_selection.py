"""The best and the worst images of a group, and the losses that learn from them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import KEY, finished, flat, setup_of, unflat
from matching_losses import POLICY, REFERENCE, errors, loss_of
from scipy.optimize import approx_fprime
from scipy.special import expit

from flowgrpo_jax import algorithms
from flowgrpo_jax.algorithms import renoise, selection


def test_the_best_images_of_a_group_take_turns():
    rollout = finished(8)
    advantage = jnp.array([1.0, -1.0, 1.0, -2.0, 0.0, -0.5, 0.7, -0.2])
    chosen, weight = selection.best(rollout, advantage, 4)
    places = [0, 2, 0, 2, 6, 6, 6, 6]
    np.testing.assert_array_equal(chosen.latents, rollout.latents[jnp.array(places)])
    assert weight.tolist() == [1.0] * 8
    np.testing.assert_array_equal(
        jax.random.key_data(chosen.keys), jax.random.key_data(rollout.keys)
    )


def test_images_without_an_advantage_are_never_selected():
    """A failed image has the advantage 0, which is here the best and the worst of its group."""
    rollout = finished(8)
    advantage = jnp.array([-1.0, 0.0, -3.0, -2.0, 2.0, 1.0, 0.0, 3.0])
    chosen, _ = selection.best(rollout, advantage, 4)
    np.testing.assert_array_equal(chosen.latents, rollout.latents[jnp.array([0] * 4 + [7] * 4)])
    pairs, weight = selection.best_and_worst(rollout, advantage, 4)
    places = [0, 2, 0, 2, 7, 5, 7, 5]
    np.testing.assert_array_equal(pairs.latents, rollout.latents[jnp.array(places)])
    assert weight.tolist() == [1.0] * 8


@pytest.mark.parametrize("select", [selection.best, selection.best_and_worst])
def test_a_group_without_spread_has_no_weight(select):
    _, weight = select(finished(8), jnp.array([0.0] * 4 + [1.0, -1.0, 0.5, -0.5]), 4)
    assert weight.tolist() == [0.0] * 4 + [1.0] * 4


def test_dpo_by_hand():
    """The third image is best and the second worst; they are seen with the noise and the levels of
    the first and the third."""
    algorithm, rollout = algorithms.load("dpo", {"beta": 5.0}), finished()
    advantage = jnp.array([0.5, -2.0, 1.2, 0.3])
    others = {"reference": REFERENCE}
    given = {"advantage": advantage, "group_size": 4, "term": 0}
    found = jax.grad(lambda p: loss_of(algorithm, rollout, p, others, **given)[0].sum())(POLICY)
    loss, figures = loss_of(algorithm, rollout, POLICY, others, **given)
    keys = rollout.keys[jnp.array([0, 0, 2, 2])]
    pairs = rollout.replace(latents=rollout.latents[jnp.array([2, 1, 2, 1])], keys=keys)
    sigma = renoise.renoise_logit_normal(setup_of(algorithm), pairs, jnp.int32(0)).sigma
    reference = errors(pairs, REFERENCE, sigma, 0)[0]

    def by_hand(theta):
        gain = errors(pairs, unflat(theta), sigma, 0)[0] - reference
        return -np.log(expit(-5 / 2 * np.array([gain[0] - gain[1], gain[2] - gain[3]])))

    theta = flat(POLICY).astype(np.float64)
    np.testing.assert_allclose(loss, np.repeat(by_hand(theta), 2), rtol=1e-4)
    wanted = approx_fprime(theta, lambda t: 2 * by_hand(t).sum(), 1e-6)
    np.testing.assert_allclose(flat(found), wanted, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(
        figures["pair_accuracy"], np.repeat(by_hand(theta) < np.log(2), 2)
    )


def test_dpo_needs_pairs():
    algorithm = algorithms.load("dpo", {})
    with pytest.raises(ValueError, match=r"sample\.group_size=5: dpo fills a group with pairs"):
        algorithm.terms(setup_of(algorithm, group_size=5), KEY)


def test_sft_learns_from_the_best_image_alone():
    algorithm, rollout = algorithms.load("sft", {}), finished()
    loss, _ = loss_of(algorithm, rollout, POLICY, {}, group_size=4, term=0)
    best = rollout.replace(latents=jnp.broadcast_to(rollout.latents[0], rollout.latents.shape))
    sigma = renoise.renoise_logit_normal(setup_of(algorithm), rollout, jnp.int32(0)).sigma
    np.testing.assert_allclose(loss, errors(best, POLICY, sigma, 0)[0], rtol=1e-4)
