"""Advantages of one reward against scipy, numpy and hand computation."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import zscore

from flowgrpo_jax import advantages
from flowgrpo_jax.advantages import DIVISORS, normalised

REWARDS = np.random.default_rng(0).normal(20, 3, size=(4, 6)).astype(np.float32)


def score(rewards, valid=None, **kwargs):
    """Advantages [P, G] of rewards [P, G]."""
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid)
    out = normalised(rewards.ravel(), valid.ravel(), group_size=rewards.shape[1], **kwargs)
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


@pytest.mark.parametrize("std", DIVISORS)
@pytest.mark.parametrize("junk", [np.nan, -1e6])
def test_an_invalid_image_is_as_if_it_had_never_been(std, junk):
    valid = np.arange(6) != 2
    rewards = np.where(valid, REWARDS, junk)
    ours = score(rewards, np.broadcast_to(valid, rewards.shape), std=std)
    np.testing.assert_allclose(ours[:, valid], score(REWARDS[:, valid], std=std), rtol=1e-5)
    assert not ours[:, ~valid].any()


@pytest.mark.parametrize("std", DIVISORS)
def test_groups_may_lose_different_images_or_all(std):
    valid = np.ones(REWARDS.shape, bool)
    valid[0], valid[1, :3] = False, False
    ours = score(REWARDS, valid, std=std)
    mean = np.array([np.mean(row[ok]) if ok.any() else 0 for row, ok in zip(REWARDS, valid)])
    scale = {"group": REWARDS[1, 3:].std(), "global": REWARDS[valid].std(), "none": 1}[std]
    np.testing.assert_allclose(ours[1, 3:], (REWARDS[1, 3:] - mean[1]) / scale, rtol=1e-3)
    assert not ours[~valid].any()


@pytest.mark.parametrize("std", DIVISORS)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 23.4, -7.7])
@pytest.mark.parametrize("group_size", [3, 24])
def test_a_constant_reward_gives_exactly_nothing(std, reward, group_size):
    """Not rounding error over epsilon: in f32 the plain mean of 24 x -7.7 is not -7.7."""
    rewards = np.full((2, group_size), reward)
    valid = np.arange(group_size) > 0
    assert not score(rewards, std=std).any()
    assert not score(rewards, np.broadcast_to(valid, rewards.shape), std=std).any()


@pytest.mark.parametrize("std", DIVISORS)
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


# ------------------------------------------------------------------ further rows of one reward

OTHERS = {"batch": {}, "quasi_norm": {}, "best_of_n": {"keep": 4}}


def of(name, rewards, clip=99.0, **options):
    """Advantages [P, G] of rewards [P, G], NaN where the reward failed."""
    rewards = jnp.asarray(rewards, jnp.float32)
    row = advantages.load(name, OTHERS[name] | options, group_size=rewards.shape[1], clip=clip)
    scores = rewards.reshape(1, -1)
    found, memory = row.compute({}, scores, jnp.ones_like(scores), jnp.arange(len(rewards)))
    assert memory == {} and found.shape == scores.shape[1:]
    return np.asarray(found).reshape(rewards.shape)


def test_batch_by_hand():
    """Mean 3 over all six, squares 4 + 1 + 0 + 1 + 4 + 0 = 10 over 5: a group's own mean is not
    taken off, so that the second one is better as a whole."""
    rewards = [[1, 2, 3], [4, 5, 3]]
    np.testing.assert_allclose(
        of("batch", rewards), np.array([[-2, -1, 0], [1, 2, 0]]) / np.sqrt(2), rtol=1e-6
    )


def test_batch_is_the_z_score_of_a_sample():
    wanted = zscore(REWARDS, axis=None, ddof=1)
    np.testing.assert_allclose(of("batch", REWARDS), wanted, rtol=1e-5)
    failing = np.where(np.arange(6) == 2, np.nan, REWARDS)
    wanted = np.nan_to_num(zscore(failing, axis=None, ddof=1, nan_policy="omit"))
    np.testing.assert_allclose(of("batch", failing), wanted, rtol=1e-5, atol=1e-7)


def test_quasi_norm_by_hand():
    """Deviations -1, -1, -1, 3: for p = 1 their sum is 6, for p = 1/2 (3 + sqrt 3)^2 = 22.392."""
    rewards, deviations = [[0, 0, 0, 4]], np.array([[-1, -1, -1, 3]])
    np.testing.assert_allclose(of("quasi_norm", rewards, power=1.0), deviations / 6, rtol=1e-4)
    np.testing.assert_allclose(of("quasi_norm", rewards, power=0.5), deviations / 22.392, rtol=1e-4)


@pytest.mark.parametrize("power", [0.8, 1.0, 2.0])
def test_quasi_norm_is_numpys(power):
    wanted = [c / np.linalg.norm(c, ord=power) for c in REWARDS - REWARDS.mean(1, keepdims=True)]
    np.testing.assert_allclose(of("quasi_norm", REWARDS, power=power), wanted, rtol=1e-4, atol=1e-6)


def test_quasi_norm_of_power_two_is_the_z_score_but_for_a_factor():
    wanted = zscore(REWARDS, axis=1) / np.sqrt(6)
    np.testing.assert_allclose(of("quasi_norm", REWARDS, power=2.0), wanted, rtol=1e-3)


def test_quasi_norm_lowers_flat_groups():
    """Two groups with the same standard deviation: one of them has a single image that is good."""
    flat, peaked = np.tile([1.0, -1.0], 6), np.eye(12)[0]
    peaked /= np.std(peaked)
    both = of("quasi_norm", [flat, peaked])
    np.testing.assert_allclose(np.abs(both[0]), 12**-1.25, rtol=1e-3)  # and 1/22 of the z-score
    assert np.linalg.norm(both[0]) < 0.5 * np.linalg.norm(both[1])
    same = of("quasi_norm", [flat, peaked], power=2.0)
    np.testing.assert_allclose(*np.linalg.norm(same, axis=1), rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_quasi_norm_forgets_the_rewards_range(scale):
    """With a small power too, whose norm is 6^10 times as large as its parts."""
    found = of("quasi_norm", scale * REWARDS, power=0.1)
    wanted = [c / np.linalg.norm(c, ord=0.1) for c in REWARDS - REWARDS.mean(1, keepdims=True)]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-12)


def test_best_of_n_by_hand():
    """Mean 3, sample variance 28 / 7: of eight images the two best and the two worst."""
    rewards = [[3, 2, 6, 1, 3, 4, 0, 5]]
    wanted = np.array([[0, 0, 3, -2, 0, 0, -3, 2]]) / 2
    np.testing.assert_allclose(of("best_of_n", rewards), wanted, rtol=1e-6)


def test_best_of_n_takes_all_or_a_pair():
    whole = of("best_of_n", REWARDS, keep=6)
    np.testing.assert_allclose(whole, zscore(REWARDS, axis=1, ddof=1), rtol=1e-4)
    pair = of("best_of_n", REWARDS, keep=2)
    best, worst = REWARDS.max(1, keepdims=True), REWARDS.min(1, keepdims=True)
    ends = (best == REWARDS) | (worst == REWARDS)
    np.testing.assert_array_equal(pair != 0, ends)
    np.testing.assert_array_equal(pair[ends], whole[ends])


def test_best_of_n_keeps_as_many_of_equal_images():
    """Ten failures and two successes: four of the failures count as best, as in upstream's sort."""
    found = of("best_of_n", [[0.0, 1.0, *[0.0] * 9, 1.0]], keep=8)
    assert (found[0] > 0).sum() == 2 and (found[0] < 0).sum() == 6


def test_best_of_n_chooses_among_the_valid():
    """Six of eight are left, so that four of them are kept, and failed ones are never the best."""
    rewards = np.array([[3, np.nan, 6, 1, 3.5, 4, np.nan, 5]])
    found = of("best_of_n", rewards)
    np.testing.assert_array_equal(found != 0, [[1, 0, 1, 1, 0, 0, 0, 1]])
    few = of("best_of_n", np.where(np.arange(8) < 4, rewards, np.nan))  # all three, of which one
    np.testing.assert_array_equal(few != 0, [[1, 0, 1, 1, 0, 0, 0, 0]])  # is best and worst


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("reward", [0.1, 23.4, -7.7])
def test_a_constant_reward_gives_nothing_in_any_row(name, reward):
    rewards = np.full((2, 24), reward)
    assert not of(name, rewards).any()
    rewards[:, ::3] = np.nan
    assert not of(name, rewards).any()


@pytest.mark.parametrize("name", OTHERS)
def test_rows_are_odd_and_follow_their_images(name):
    ours = of(name, REWARDS)
    order = np.random.default_rng(1).permutation(6)
    np.testing.assert_allclose(of(name, REWARDS[:, order]), ours[:, order], atol=1e-5)
    np.testing.assert_allclose(of(name, REWARDS[::-1]), ours[::-1], atol=1e-5)
    np.testing.assert_allclose(of(name, REWARDS + 16), ours, atol=1e-5)
    np.testing.assert_allclose(of(name, -REWARDS), -ours, atol=1e-5)
    assert np.abs(of(name, REWARDS, clip=0.1)).max() == pytest.approx(0.1)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dead", [0, 3])
def test_a_group_without_any_score_has_no_advantage(name, dead):
    rewards = np.array(REWARDS)
    rewards[dead] = np.nan
    ours = of(name, rewards)
    assert np.isfinite(ours).all() and not ours[dead].any()
    rest = np.arange(4) != dead
    np.testing.assert_allclose(ours[rest], of(name, REWARDS[rest]), rtol=1e-5)


@pytest.mark.parametrize(
    "name, options, problem",
    [
        ("groups", {}, r"advantage 'groups' is unknown: choose from batch, best_of_n, gdpo, glob"),
        ("group", {"std": 1}, r"advantage.options of group: std is unknown"),
        ("gdpo", {"std": "prompt"}, r"std='prompt': choose from group, global, none"),
        ("per_prompt", {"min_count": 99}, r"min_count=99 must be between 1 and buffer_size=32"),
        (
            "quasi_norm",
            {"power": 0},
            r"power=0: must be above 0 and at most 2; the paper's is 0\.8",
        ),
        ("quasi_norm", {"power": 2.5}, r"power=2\.5: must be above 0 and at most 2"),
        ("best_of_n", {"keep": 1}, r"keep=1: .*must be even, from 2 to sample\.group_size=2"),
        ("best_of_n", {}, r"keep=8: .*must be even, from 2 to sample\.group_size=2"),
        ("nowhere.at_all:make", {}, r"'nowhere.at_all:make' cannot be imported: No module named"),
        ("flowgrpo_jax.advantages:nothing", {}, r"cannot be imported: .*no attribute 'nothing'"),
    ],
)
def test_a_wrong_row_is_named(name, options, problem):
    with pytest.raises(ValueError, match=problem):
        advantages.load(name, options, group_size=2, clip=5.0)


def test_the_exponential_transform_is_minus_exp_of_minus_a():
    """It keeps the order, is cut as advantages are, and leaves images without a score at 0."""
    row = advantages.load("none", {}, group_size=4, clip=5.0)
    pushed = advantages.TRANSFORMS["exp"](row, 5.0)
    scores = jnp.array([[1.0, 3.0, jnp.nan, -4.0, 2.0, 2.0, 2.0, 2.0]])
    found, _ = pushed.compute({}, scores, jnp.ones_like(scores), jnp.arange(2))
    wanted = [-np.exp(-1.0), -np.exp(-3.0), 0, -5.0, -1, -1, -1, -1]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert advantages.TRANSFORMS["none"](row, 5.0) is row
