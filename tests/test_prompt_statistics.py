"""Advantages by the remembered rewards of each prompt, against a deque."""

from collections import deque

import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import advantages


def ddpo(rewards, ids, buffers, *, size, least):
    """The advantages [P, G] of an epoch by a deque for each prompt, which is changed in place."""
    for prompt, values in zip(ids, rewards):
        buffers.setdefault(prompt, deque(maxlen=size)).extend(values)
    out = []
    for prompt, values in zip(ids, rewards):
        known = np.array(buffers[prompt]) if len(buffers[prompt]) >= least else rewards
        out.append((values - known.mean()) / (known.std() + 1e-6))
    return np.array(out)


def remembered(row, epochs, ids):
    memory, found = row.initial(6), []
    for rewards in epochs:
        scores = jnp.asarray(rewards, jnp.float32).reshape(1, -1)
        advantage, memory = row.compute(memory, scores, jnp.ones_like(scores), jnp.asarray(ids))
        found.append(np.asarray(advantage).reshape(len(ids), -1))
    return found, memory


@pytest.mark.parametrize("size, least", [(16, 16), (7, 5), (32, 16)])
def test_statistics_of_each_prompt_are_a_deques(size, least):
    """A prompt may come twice in an epoch; first the batch is used, later the prompt."""
    options = {"buffer_size": size, "min_count": least}
    row = advantages.load("per_prompt", options, group_size=4, clip=99.0)
    ids = [4, 0, 4]
    epochs = np.random.default_rng(0).normal(3, 2, size=(8, 3, 4)).round(2)
    buffers = {}
    wanted = [ddpo(e, ids, buffers, size=size, least=least) for e in epochs]
    found, memory = remembered(row, epochs, ids)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    stored = np.asarray(memory["rewards"][4])
    np.testing.assert_allclose(stored[np.isfinite(stored)], buffers[4], rtol=1e-6)
    assert np.isnan(memory["rewards"][1]).all()  # a prompt that never came


def test_a_failed_reward_is_not_remembered():
    row = advantages.load("per_prompt", {"min_count": 2}, group_size=3, clip=5.0)
    [first, second], memory = remembered(row, [[[1.0, np.nan, 3.0]], [[2.0, 2.0, np.nan]]], [1])
    np.testing.assert_allclose(first, [[-1, 0, 1]], rtol=1e-5)
    np.testing.assert_allclose(second, [[0, 0, 0]], atol=1e-6)
    stored = np.asarray(memory["rewards"][1])
    np.testing.assert_array_equal(stored[np.isfinite(stored)], [1, 3, 2, 2])
