"""Advantages of several rewards at once: their sum, and GDPO's sum of what each gives alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import zscore

from flowgrpo_jax import advantages

IDS = jnp.arange(3)


def several(scores, weights, name):
    weights = np.broadcast_to(np.array(weights, np.float32)[:, None], np.shape(scores))
    row = advantages.load(name, {}, group_size=4, clip=5.0)
    advantage, memory = row.compute({}, jnp.asarray(scores, jnp.float32), weights, IDS)
    assert memory == {}
    return np.asarray(advantage)


def test_advantages_of_several_rewards_do_not_depend_on_their_ranges():
    """GDPO: a reward a thousand times larger drowns the other in the sum, and not by itself."""
    a, b = np.random.default_rng(1).normal(size=(2, 12))
    large = 1000 * b + 7
    np.testing.assert_allclose(
        several([a, large], [1, 1], "gdpo"),
        several([a, b], [1, 1], "gdpo"),
        atol=1e-3,
    )
    drowned = several([a, large], [1, 1], "group")
    np.testing.assert_allclose(drowned, several([large], [1], "group"), atol=2e-2)
    assert np.corrcoef(several([a, large], [1, 1], "gdpo"), a)[0, 1] > 0.5


def test_advantages_of_several_rewards_are_sums_of_z_scores():
    a, b = np.random.default_rng(2).normal(size=(2, 12))
    z = [zscore(x.reshape(3, 4), axis=1).reshape(-1) for x in (a, b)]
    mixed = 0.25 * z[0] + 0.75 * z[1]
    ours = several([a, b], [0.25, 0.75], "gdpo")
    np.testing.assert_allclose(ours, mixed / mixed.std(), atol=1e-3)  # the epsilons


@pytest.mark.parametrize("name", ["group", "gdpo"])
def test_a_failed_score_takes_its_image_out_unless_it_is_a_monitors(name):
    a, b = np.random.default_rng(3).normal(size=(2, 12))
    failing = np.where(np.arange(12) == 5, np.nan, b)
    assert several([a, failing], [1, 1], name)[5] == 0
    assert np.isfinite(several([a, failing], [1, 1], name)).all()
    watched = several([a, failing], [1, 0], name)
    np.testing.assert_allclose(watched, several([a], [1], name), rtol=1e-6)
    absent = several([a, failing], [1, np.nan], name)  # does not apply
    np.testing.assert_array_equal(absent, watched)
