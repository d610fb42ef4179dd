"""The reward of pairwise comparisons: the share of its group that a judge prefers an image to."""

import itertools

import numpy as np
import pytest
from http_stub import Stub
from judge_stub import MODEL, brighter, completion, gray, load

from flowgrpo_jax.rewards import preference
from flowgrpo_jax.types import scope_of


def prefer(answer, images, prompts, **options):
    with Stub(answer) as stub:
        reward = load("preference", stub, **options)
        return *reward(images, prompts, [{}] * len(prompts)), stub


def test_the_reward_is_the_share_of_the_group_that_an_image_beats():
    scores, valid, stub = prefer(brighter, gray(10, 50, 30, 40, 20), ["a"] * 5)
    assert valid.all() and len(stub.seen) == 10
    np.testing.assert_allclose(scores, [0, 1, 0.5, 0.75, 0.25], atol=1e-6)


def test_preference_is_given_whole_groups():
    """And refuses a call with two prompts, such as a request to a server may hold."""
    assert scope_of(preference.make("http://a", MODEL)) == "group"
    with pytest.raises(ValueError, match="images of 2 prompts"):
        prefer(brighter, gray(1, 2), ["a", "b"])


def test_a_tie_is_half_a_win_for_both():
    scores, valid, _ = prefer(brighter, gray(10, 20, 20), ["a"] * 3)
    assert valid.all()
    np.testing.assert_allclose(scores, [0, 0.75, 0.75])


def test_a_failed_comparison_counts_for_neither():
    scores, valid, _ = prefer(brighter, gray(10, 0, 30, 20), ["a"] * 4, retries=0)
    np.testing.assert_array_equal(valid, [True, False, True, True])
    np.testing.assert_allclose(scores, [0, 0, 1, 0.5])
    _, valid, _ = prefer(brighter, gray(0, 50), ["a"] * 2, retries=0)
    assert not valid.any()


def test_an_image_alone_with_its_prompt_is_invalid():
    scores, valid, stub = prefer(brighter, gray(10), ["a"])
    assert not valid.any() and not stub.seen and scores == [0]


def test_a_judge_that_favours_a_place_moves_nobody():
    first = lambda request, body: completion("<answer>Image 1 is better</answer>")  # noqa: E731
    scores, _, _ = prefer(first, gray(*range(1, 8)), ["a"] * 7)
    np.testing.assert_allclose(scores, 0.5)


@pytest.mark.parametrize("n", range(1, 9))
def test_every_pair_of_a_group_meets_once(n):
    pairs = list(preference.duels(n, None))
    assert sorted(tuple(sorted(pair)) for pair in pairs) == list(
        itertools.combinations(range(n), 2)
    )


@pytest.mark.parametrize("n, opponents, met", [(24, 4, 4), (24, 3, 4), (7, 2, 2), (4, 9, 3)])
def test_fewer_opponents(n, opponents, met):
    pairs = list(preference.duels(n, opponents))
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    counts = np.bincount(np.ravel(pairs), minlength=n)
    np.testing.assert_array_equal(counts, met)


def test_preference_options_that_cannot_be():
    with pytest.raises(ValueError, match="opponents=0"):
        preference.make("http://a", MODEL, opponents=0)
    with pytest.raises(ValueError, match="one group"):
        preference.make("http://a", MODEL, pattern="(1)|(2)")
