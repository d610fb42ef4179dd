"""Figures that the tests of other projects publish, as an oracle from outside.

Sources: guoriyue/VRL (NFT's advantages), verl-project/verl-omni (advantages, the share of NFT's
positive policy, the Gaussian KL), radixark/miles_diffusion (sigma_max, NFT's levels, antithetic
noise), Tencent-Hunyuan/UniRL (the clip of advantages).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import SIGMAS, finished, linear, setup_of, weights

from flowgrpo_jax import advantages, algorithms
from flowgrpo_jax.sampling import sde
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.scoring.scores import reward_figures
from flowgrpo_jax.types import Credit


def advantage(rewards, name, group_size, clip=5.0):
    row = advantages.load(name, {}, group_size=group_size, clip=clip)
    scores = jnp.asarray([rewards], jnp.float32)
    ids = jnp.arange(len(rewards) // group_size)
    return row.compute(row.initial(9), scores, jnp.ones_like(scores), ids)[0]


@pytest.mark.parametrize("name, end", [("group", 1.2247449), ("global", 0.58554)])
def test_advantages_of_one_to_six_in_two_groups(name, end):
    found = advantage([1, 2, 3, 4, 5, 6], name, 3)
    np.testing.assert_allclose(found, [-end, 0, end] * 2, atol=2e-4)


def test_advantages_without_a_standard_deviation():
    np.testing.assert_array_equal(advantage([1, 3, 0, 2], "none", 2), [-1, 1, -1, 1])


def test_advantages_beyond_the_clip_count_like_those_at_it():
    far, near = (advantage([x, -x, 1, -1], "none", 4) for x in (50, 5))
    np.testing.assert_array_equal(far, near)


def test_all_groups_without_spread():
    assert reward_figures(np.array([1.0, 1.0, 0.0, 0.0]), 2)["dead_groups"] == 1.0


def test_the_kl_of_gaussians_two_apart():
    mean = jnp.full((1, 2, 2, 3), 2.0)
    np.testing.assert_allclose(sde.kl(mean, 0 * mean, jnp.float32(1), jnp.float32(-1)), 2.0)


def nft_loss(advantage, old):
    algorithm, rollout = algorithms.load("nft", {"anchor": 0.0}), finished()
    velocities = {"policy": partial(linear, weights(0)), "old": partial(linear, old)}
    given = Credit(jnp.full(4, advantage))
    return algorithm.loss(setup_of(algorithm), velocities, rollout, jnp.int32(2), given)[0]


@pytest.mark.parametrize("given, share", [(-5, 0), (-1, 0.4), (0, 0.5), (1, 0.6), (5, 1), (9, 1)])
def test_the_share_of_nfts_positive_policy(given, share):
    """The loss lies between that of the negative policy alone and that of the positive one."""
    negative, positive = nft_loss(-5.0, weights(1)), nft_loss(5.0, weights(1))
    assert (np.abs(positive - negative) > 1e-3 * positive).all()
    wanted = share * positive + (1 - share) * negative
    np.testing.assert_allclose(nft_loss(given, weights(1)), wanted, rtol=1e-5)


def test_nfts_loss_does_not_know_the_sign_where_old_is_current():
    np.testing.assert_allclose(nft_loss(2.0, weights(0)), nft_loss(-2.0, weights(0)), rtol=1e-6)


def test_nft_trains_four_levels_of_five_steps():
    algorithm = algorithms.load("nft", {})
    setup = setup_of(algorithm, sigmas=(1.0, 0.8, 0.6, 0.4, 0.2, 0.0))
    levels = np.array(setup.process.sigmas)[algorithm.terms(setup, jax.random.key(0))]
    np.testing.assert_allclose(levels, [1, 0.8, 0.6, 0.4])


def test_a_sigma_close_to_1_takes_the_second_sigma():
    """0.999993 is not 1, and 1 / (1 - sigma) is 140,000 there."""
    found = sde.FLOW_DIFFUSION.coefficient(jnp.float32(0.999993), jnp.float32(0.990818))
    np.testing.assert_allclose(found, np.sqrt(0.999993 / (1 - 0.990818)), rtol=1e-4)


@pytest.mark.parametrize("kernel", [sde.CPS, sde.FLOW_SDE], ids=["cps", "flow_sde"])
def test_opposite_noise_cancels_where_the_advantage_is_constant(kernel):
    """On policy the gradients of two draws, mean + std z and mean - std z, add up to none."""
    process = Process(SIGMAS, kernel, 0.7, window=len(SIGMAS) - 2)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    drawn = process.transition(x, linear(weights(0), x, SIGMAS[2]), 2, x_next=x)
    z = jax.random.normal(jax.random.key(1), x.shape)

    def score(params, sign):
        x_next = drawn.mean + sign * drawn.std * z
        return process.transition(x, linear(params, x, SIGMAS[2]), 2, x_next=x_next).log_prob.sum()

    up, down = (jax.grad(score)(weights(0), sign) for sign in (1.0, -1.0))
    for name in up:
        assert np.abs(up[name]).max() > 1e-2
        np.testing.assert_allclose(up[name], -down[name], atol=1e-5 * np.abs(up[name]).max())
