"""The worker of the reward server: what it scores together, refuses and drops."""

import asyncio
import threading
from concurrent.futures import Future

import numpy as np
import pytest
from reward_server import LIMITS, pictures

from flowgrpo_jax import serve
from flowgrpo_jax.transport import wire_format, worker
from flowgrpo_jax.types import GraphReward


def test_a_reward_in_the_graph_is_served_as_well():
    """Of any batch size, of which only few are compiled."""
    traced = []

    def score(weights, images, lengths):
        traced.append(images.shape)
        return images.mean((1, 2, 3)) * weights + lengths

    def prepare(prompts, metadata):
        return np.array([len(p) if p else np.nan for p in prompts], np.float32)

    served = worker.on_host(GraphReward(np.float32(2.0), prepare, score))
    for n in (1, 3, 4, 5, 7, 8):
        images = pictures(n)
        prompts = ["x" * (i % 3) for i in range(n)]
        scores, valid = served(images, prompts, [{}] * n)
        lengths = np.arange(n) % 3
        np.testing.assert_array_equal(valid, lengths > 0)
        expected = 2 * images.reshape(n, -1).mean(1) + lengths
        np.testing.assert_allclose(scores[valid], expected[valid], rtol=1e-5)
    assert {shape[0] for shape in traced} == {1, 4, 8} and len(traced) == 3


@pytest.mark.parametrize("scope, together", [("image", True), ("group", False), ("epoch", False)])
def test_requests_to_a_group_reward_are_scored_one_by_one(scope, together):
    """Two of them may be groups of one prompt, from two epochs or from two runs."""
    started, go, sizes = threading.Event(), threading.Event(), []

    def reward(images, prompts, metadata):
        sizes.append(len(images))
        started.set()
        go.wait(5)
        return np.zeros(len(images)), np.ones(len(images), bool)

    reward.scope = scope
    thread = worker.Worker(lambda: reward, batch=64, waiting=9)
    thread.start()
    first = thread.submit(pictures(1), ["a"], [{}])
    assert started.wait(5)
    rest = [thread.submit(pictures(4), ["a"] * 4, [{}] * 4) for _ in range(2)]
    go.set()
    assert all(future.result(5)[1].all() for future in [first, *rest])
    assert sizes == ([1, 8] if together else [1, 4, 4])
    assert thread.scope == scope


def test_the_worker_refuses_more_than_may_wait():
    started, go = threading.Event(), threading.Event()

    def reward(images, prompts, metadata):
        started.set()
        go.wait(5)
        return np.zeros(len(images)), np.ones(len(images), bool)

    thread = worker.Worker(lambda: reward, batch=1, waiting=2)
    thread.start()
    job = (pictures(1), ["a"], [{}])
    first = thread.submit(*job)
    assert started.wait(5)
    waiting = [thread.submit(*job) for _ in range(2)]
    assert thread.submit(*job) is None
    waiting.pop().cancel()  # whose client has gone: it makes room, and is not scored
    waiting.append(thread.submit(*job))
    go.set()
    assert all(future.result(5)[1].all() for future in [first, *waiting])


def test_a_request_whose_client_has_gone_is_dropped():
    """A client that gave up asks again: scored twice, overload would feed itself."""
    submitted = []

    class Busy:
        ready = True

        def submit(self, *job):
            submitted.append(Future())
            return submitted[-1]

    async def body():
        yield wire_format.encode(pictures(1), ["a"], [{}])

    async def gone():
        return True

    status, _ = asyncio.run(serve._score(body(), Busy(), LIMITS, gone))
    assert status == 503 and submitted[0].cancelled()


def test_integers_for_scores_and_for_booleans_are_served_as_they_are_trained_on():
    def reward(images, prompts, metadata):
        return [1] * len(images), [1] * len(images)

    thread = worker.Worker(lambda: reward, batch=1, waiting=2)
    thread.start()
    answer = wire_format.encode_scores(*thread.submit(pictures(1), ["a"], [{}]).result(5))
    scores, valid = wire_format.decode_scores(answer, 1)
    assert scores.tolist() == [1.0] and valid.tolist() == [True]
