"""FlowBP, the reward's gradient at some of the steps, against numbers by hand and DRaFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goal_reward import GOAL, gradient, near, path
from linear_policy import IMAGES, KEY, SIGMAS, setup_of, weights

from flowgrpo_jax import algorithms
from flowgrpo_jax.algorithms import flowbp


@pytest.mark.parametrize("active", [8, 3])
def test_flowbp_by_hand(active):
    """The reward's slope at the image, times the steps' lengths, times the rescaling."""
    algorithm = algorithms.load("flowbp", {"active": active, "rescale": 0.5})
    params, rollout = weights(0), path(weights(0))
    (seed,) = algorithm.terms(setup_of(algorithm), KEY)
    steps = np.asarray(flowbp.draw_steps(seed, 8, active, 1.0))
    assert len(set(steps.tolist())) == active
    lengths = np.diff(SIGMAS)
    gain = 1 + 0.5 * (np.sum(lengths) / np.sum(lengths[steps]) - 1)
    slope = 2 * (np.asarray(rollout.latents) - GOAL)  # of the loss
    by_b = sum(gain * lengths[k] * SIGMAS[k] for k in steps) * slope.sum((1, 2)).mean(0)
    by_w = np.mean(
        [
            sum(gain * lengths[k] * np.asarray(rollout.x[k, i]).reshape(-1, 3) for k in steps).T
            @ slope[i].reshape(-1, 3)
            for i in range(IMAGES)
        ],
        axis=0,
    )
    found, figures = gradient(algorithm, params, rollout)
    np.testing.assert_allclose(found["b"], by_b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["w"], by_w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(figures["policy_loss"], -near(rollout.latents)[0].mean(), rtol=1e-5)


def test_flowbp_with_all_steps_is_draft_where_velocities_do_not_see_the_latents():
    params = weights(0) | {"w": jnp.zeros((3, 3))}
    rollout = path(params)
    all_steps = algorithms.load("flowbp", {"active": 8})
    ours, draft = (gradient(row, params, rollout)[0] for row in (all_steps, "draft_all"))
    np.testing.assert_allclose(ours["b"], draft["b"], rtol=1e-4)


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_late_steps_are_drawn_more_often(bias):
    seeds = jnp.arange(3000)
    drawn = jax.vmap(lambda seed: flowbp.draw_steps(seed, 4, 1, bias))(seeds)
    shares = np.bincount(np.ravel(drawn), minlength=4) / 3000
    weight = np.arange(1, 5) ** bias
    np.testing.assert_allclose(shares, weight / weight.sum(), atol=0.03)
