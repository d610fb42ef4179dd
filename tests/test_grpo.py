"""Advantages against scipy and hand computation, the clipped loss in each of its regimes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import zscore

from flowgrpo_jax.grpo import LOSSES, STD_MODES, advantages, combined_advantages, policy_loss

REWARDS = np.random.default_rng(0).normal(20, 3, size=(4, 6)).astype(np.float32)


def score(rewards, valid=None, **kwargs):
    """Advantages [P, G] of rewards [P, G]."""
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid)
    out = advantages(rewards.ravel(), valid.ravel(), group_size=rewards.shape[1], **kwargs)
    return np.asarray(out).reshape(rewards.shape)


def test_by_hand():
    """Group means 3 and 0; population variances 14 / 4 and 4 / 4, and 9 / 2 over all eight."""
    rewards = [[1, 2, 3, 6], [-1, -1, 1, 1]]
    centred = np.array([[-2, -1, 0, 3], [-1, -1, 1, 1]])
    spread = {"group": np.sqrt([[14 / 4], [1.0]]), "global": np.sqrt(9 / 2), "none": 1}
    for std, scale in spread.items():
        np.testing.assert_allclose(score(rewards, std=std, epsilon=0), centred / scale, rtol=1e-6)
    np.testing.assert_allclose(score([[0, 2]], epsilon=1.0), [[-0.5, 0.5]])


def test_group_std_is_the_z_score():
    np.testing.assert_allclose(score(REWARDS), zscore(REWARDS, axis=1), rtol=1e-3)


def test_clip():
    """One success among n has z-score sqrt(n - 1)."""
    rewards = np.eye(1, 30)
    np.testing.assert_allclose(score(rewards, epsilon=0, clip=9)[0, 0], np.sqrt(29), rtol=1e-5)
    assert score(rewards)[0, 0] == 5
    assert score(-rewards)[0, 0] == -5


@pytest.mark.parametrize("std", STD_MODES)
@pytest.mark.parametrize("junk", [np.nan, -1e6])
def test_an_invalid_image_is_as_if_it_had_never_been(std, junk):
    valid = np.arange(6) != 2
    rewards = np.where(valid, REWARDS, junk)
    ours = score(rewards, np.broadcast_to(valid, rewards.shape), std=std)
    np.testing.assert_allclose(ours[:, valid], score(REWARDS[:, valid], std=std), rtol=1e-5)
    assert not ours[:, ~valid].any()


@pytest.mark.parametrize("std", STD_MODES)
def test_groups_may_lose_different_images_or_all(std):
    valid = np.ones(REWARDS.shape, bool)
    valid[0], valid[1, :3] = False, False
    ours = score(REWARDS, valid, std=std)
    mean = np.array([np.mean(row[ok]) if ok.any() else 0 for row, ok in zip(REWARDS, valid)])
    scale = {"group": REWARDS[1, 3:].std(), "global": REWARDS[valid].std(), "none": 1}[std]
    np.testing.assert_allclose(ours[1, 3:], (REWARDS[1, 3:] - mean[1]) / scale, rtol=1e-3)
    assert not ours[~valid].any()


@pytest.mark.parametrize("std", STD_MODES)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 23.4, -7.7])
@pytest.mark.parametrize("group_size", [3, 24])
def test_a_constant_reward_gives_exactly_nothing(std, reward, group_size):
    """Not rounding error over epsilon: in f32 the plain mean of 24 x -7.7 is not -7.7."""
    rewards = np.full((2, group_size), reward)
    valid = np.arange(group_size) > 0
    assert not score(rewards, std=std).any()
    assert not score(rewards, np.broadcast_to(valid, rewards.shape), std=std).any()


@pytest.mark.parametrize("std", STD_MODES)
def test_symmetries(std):
    ours = score(REWARDS, std=std)
    order = np.random.default_rng(1).permutation(REWARDS.shape[1])
    np.testing.assert_allclose(score(REWARDS[:, order], std=std), ours[:, order], atol=1e-5)
    np.testing.assert_allclose(score(REWARDS[::-1], std=std), ours[::-1], atol=1e-5)
    np.testing.assert_allclose(score(REWARDS + 16, std=std), ours, atol=1e-5)
    np.testing.assert_allclose(score(-REWARDS, std=std), -ours, atol=1e-5)
    np.testing.assert_allclose(ours.sum(axis=1), 0, atol=1e-4)


def test_only_group_std_forgets_a_groups_own_scale():
    ratio = np.array([[1], [2], [4], [8]])
    np.testing.assert_allclose(score(ratio * REWARDS), score(REWARDS), atol=1e-3)
    plain = score(REWARDS, std="none", clip=99)
    np.testing.assert_allclose(
        score(ratio * REWARDS, std="none", clip=99), ratio * plain, atol=1e-4
    )


# --------------------------------------------------------------------------- several rewards


def several(scores, weights, **kwargs):
    weights = np.broadcast_to(np.array(weights, np.float32)[:, None], np.shape(scores))
    scores = np.asarray(scores, np.float32)
    return np.asarray(combined_advantages(scores, weights, group_size=4, **kwargs))


def test_advantages_of_several_rewards_do_not_depend_on_their_ranges():
    """GDPO: a reward a thousand times larger drowns the other in the sum, and not by itself."""
    a, b = np.random.default_rng(1).normal(size=(2, 12))
    large = 1000 * b + 7
    np.testing.assert_allclose(
        several([a, large], [1, 1], combine="advantages"),
        several([a, b], [1, 1], combine="advantages"),
        atol=1e-3,
    )
    drowned = several([a, large], [1, 1], combine="rewards")
    np.testing.assert_allclose(drowned, several([large], [1]), atol=2e-2)
    assert np.corrcoef(several([a, large], [1, 1], combine="advantages"), a)[0, 1] > 0.5


def test_advantages_of_several_rewards_are_sums_of_z_scores():
    a, b = np.random.default_rng(2).normal(size=(2, 12))
    z = [zscore(x.reshape(3, 4), axis=1).reshape(-1) for x in (a, b)]
    mixed = 0.25 * z[0] + 0.75 * z[1]
    ours = several([a, b], [0.25, 0.75], combine="advantages")
    np.testing.assert_allclose(ours, mixed / mixed.std(), atol=1e-3)  # the epsilons


@pytest.mark.parametrize("combine", ["rewards", "advantages"])
def test_a_failed_score_takes_its_image_out_unless_it_is_a_monitors(combine):
    a, b = np.random.default_rng(3).normal(size=(2, 12))
    failing = np.where(np.arange(12) == 5, np.nan, b)
    assert several([a, failing], [1, 1], combine=combine)[5] == 0
    assert np.isfinite(several([a, failing], [1, 1], combine=combine)).all()
    watched = several([a, failing], [1, 0], combine=combine)
    np.testing.assert_allclose(watched, several([a], [1], combine=combine), rtol=1e-6)
    absent = several([a, failing], [1, np.nan], combine=combine)  # does not apply
    np.testing.assert_array_equal(absent, watched)


# ------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",  # slope = d loss / d log_prob, 0 where the clip holds
    [
        (2, 1.5, -2.4, 0.0),  # better and already likelier: clipped
        (2, 0.5, -1.0, -1.0),  # better but less likely: pulled back, unclipped
        (-2, 1.5, 3.0, 3.0),  # worse but likelier: pushed back, unclipped
        (-2, 0.5, 1.6, 0.0),  # worse and already less likely: clipped
        (2, 1.1, -2.2, -2.2),  # within the range
        (-2, 0.9, 1.8, 1.8),
        (2, 1.0, -2.0, -2.0),  # on policy the slope is -A
        (-2, 1.0, 2.0, 2.0),
        (0, 1.5, 0.0, 0.0),
    ],
)
def test_clipped_loss(advantage, ratio, loss, slope):
    old = jnp.float32(-0.7)

    def value(log_prob):
        return policy_loss(log_prob, old, jnp.float32(advantage), 0.2)

    (ours, its_ratio), gradient = jax.value_and_grad(value, has_aux=True)(old + np.log(ratio))
    np.testing.assert_allclose([ours, its_ratio, gradient], [loss, ratio, slope], atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_the_gradient_is_the_policy_gradient(name):
    log_prob, advantage = jnp.linspace(-3, 3, 7), jnp.linspace(-5, 5, 7)
    gradient = jax.grad(lambda p: LOSSES[name](p, log_prob, advantage, 1e-5)[0].sum())(log_prob)
    np.testing.assert_allclose(gradient, -advantage)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("log_ratio", [-1e4, 19.9, 45.0, 100.0, 1e4])
def test_far_off_policy_loss_and_gradient_are_finite(name, log_ratio):
    """Log-probs that are sums over 65,536 dimensions move by as much, and one such image must not
    take the whole update with it, least of all one without an advantage."""
    advantage, old = jnp.array([1.0, 0.0, -1.0]), jnp.zeros(3)

    def total(log_prob):
        return LOSSES[name](log_prob, old, advantage, 0.2)[0].sum()

    value, gradient = jax.value_and_grad(total)(old + log_ratio)
    assert np.isfinite(value) and gradient[1] == 0
    assert np.isfinite((1e6 * gradient) ** 2).all()  # in its norm, by a steep log-prob
