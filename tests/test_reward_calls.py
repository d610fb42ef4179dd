"""Calls of rewards: guarded, combined, and made in two ways that agree."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noise_pictures import PICTURES

from flowgrpo_jax import advantages, sharding
from flowgrpo_jax.command_line.stop import Stop
from flowgrpo_jax.scoring import host
from flowgrpo_jax.scoring.pending import PendingScores
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.types import Pictures

RNG = np.random.default_rng(0)


# ----------------------------------------------------------------------------- guarded and combined


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)), np.ones(len(images), bool)


def is_first(images, prompts, metadata):
    return [float(p == "a") for p in prompts], [m["ok"] for m in metadata]


def raising(images, prompts, metadata):
    raise RuntimeError("the server is down")


def returning(scores, valid):
    return lambda images, prompts, metadata: (scores, valid)


RECORDS = [{"prompt": p, "ok": p != "c"} for p in "abcd"]


def lookup(ids):
    return [RECORDS[i] for i in ids]


def combine(rewards, weights):
    """(scores, total, valid) of four pictures, one of each prompt."""
    mix = RewardWeights(weights)
    scores = host.composite(rewards, lookup, mix.applies)(PICTURES[:4], np.arange(4))
    stacked = np.stack([scores[name] for name in mix.names])
    return scores, *advantages.weighted(stacked, mix.table(RECORDS))


@pytest.mark.parametrize(
    "broken",
    [
        raising,
        returning(np.zeros(3), np.ones(3, bool)),  # of four images
        returning(np.zeros((4, 1)), np.ones((4, 1), bool)),
        returning(np.zeros(4), True),
        returning(["high"] * 4, [True] * 4),
        lambda images: (np.zeros(4), np.ones(4, bool)),
        lambda *batch: sys.exit(0),  # a library that thinks it is alone
    ],
)
def test_a_broken_reward_invalidates_its_batch_and_is_logged(broken, caplog):
    scores, valid = host.guarded("aesthetic", broken, PICTURES[:4], list("abcd"), [{}] * 4)
    np.testing.assert_array_equal(scores, [0, 0, 0, 0])
    assert not valid.any() and "'aesthetic' failed on 4 images" in caplog.text


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_invalidates_its_image_alone(junk):
    reward = returning([1.0, junk, 3.0, 4.0], [True, True, False, True])
    scores, valid = host.guarded("r", reward, PICTURES[:4], list("abcd"), [{}] * 4)
    np.testing.assert_array_equal(valid, [True, False, False, True])
    np.testing.assert_array_equal(scores, [1, 0, 0, 4])


def test_the_total_is_the_weighted_sum():
    scores, total, valid = combine(
        {"brightness": brightness, "first": is_first}, {"brightness": 0.1, "first": -20}
    )
    mean = PICTURES[:4].reshape(4, -1).mean(1)
    np.testing.assert_array_equal(valid, [True, True, False, True])
    expected = 0.1 * mean - np.array([20, 0, 0, 0])
    np.testing.assert_allclose(total[valid], expected[valid], rtol=1e-5)
    np.testing.assert_allclose(scores["brightness"], mean, rtol=1e-6)
    np.testing.assert_array_equal(scores["first"], [1, 0, np.nan, 0])


def test_a_weight_of_zero_is_watched_and_never_trained_on():
    _, alone, _ = combine({"brightness": brightness}, {"brightness": 1.0})
    for monitor in (is_first, raising):
        scores, total, valid = combine(
            {"brightness": brightness, "monitor": monitor}, {"brightness": 1.0, "monitor": 0.0}
        )
        assert valid.all() and "monitor" in scores
        np.testing.assert_array_equal(total, alone)


def test_every_task_has_its_own_rewards():
    """A reward sees only the prompts that it is meant for, and no other prompt waits for it."""
    seen = []

    def picky(images, prompts, metadata):
        seen.extend(prompts)
        return [10.0] * len(prompts), [True] * len(prompts)

    mix = RewardWeights({"brightness": 1.0}, {"text": {"picky": 2.0, "brightness": 0.0}})
    tasks = ({"task": "text"}, {}, {"task": "other"}, {"task": "text"})
    records = [{"prompt": prompt, **task} for prompt, task in zip("abcd", tasks)]
    assert mix.names == ("brightness", "picky")
    nan = np.nan
    np.testing.assert_array_equal(mix.table(records), [[0, 1, 1, 0], [2, nan, nan, 2]])
    rewards = {"brightness": brightness, "picky": picky}
    score = host.composite(rewards, lambda ids: records, mix.applies)
    scores = score(PICTURES[:4], np.arange(4))
    assert seen == ["a", "d"]
    mean = PICTURES[:4].reshape(4, -1).mean(1)
    total, valid = advantages.weighted(np.stack([scores[n] for n in mix.names]), mix.table(records))
    assert valid.all()
    np.testing.assert_allclose(total, [20, mean[1], mean[2], 20], rtol=1e-6)


# ------------------------------------------------------------------------------- called in two ways


def compare_calls(devices):
    """In a jitted program, in threads beside it, and by a plain call: the same scores."""
    assert jax.device_count() == devices
    mesh, scored = sharding.make_mesh(), []

    def by_id(images, prompts, metadata):
        ids = np.array([int(p) for p in prompts])
        scored.append(ids.tolist())
        return images.mean((1, 2, 3)) + 1000 * ids, ids != 5

    parts = {"by_id": by_id, "brightness": brightness}
    weights, records = (
        RewardWeights(dict.fromkeys(parts, 1.0)),
        [{"prompt": str(i)} for i in range(16)],
    )
    scorer = Scorer(weights, parts, records, mesh, threads=2)
    ids = RNG.permutation(16).astype(np.int32)
    images, rows = sharding.split_rows(mesh, (PICTURES, ids))

    in_graph = scorer.inside_program()
    called = jax.device_get(jax.jit(lambda x, i: in_graph(255 - x, i))(images, rows))
    assert sorted(scored) == sorted(part.tolist() for part in np.split(ids, devices))

    with PendingScores(scorer, ids) as pending:
        pending.add(Pictures(255 - images, jnp.ones(16, bool)), {}, rows)
        overlapped = pending.collect(Stop().wait)
    mean = 255 - PICTURES.reshape(16, -1).mean(1)
    expected = np.stack([np.where(ids != 5, 1000 * ids + mean, np.nan), mean])
    np.testing.assert_allclose(overlapped.values, expected, rtol=1e-6)
    np.testing.assert_array_equal(overlapped.values, [called[name] for name in overlapped.names])


def test_waiting_for_a_picture_is_no_time_of_a_reward(monkeypatch):
    """By a clock of our own: the picture takes 50 seconds to be drawn, and the reward 3."""
    clock = SimpleNamespace(now=0.0)
    own_rows = sharding.own_rows

    def drawn_late(images):
        clock.now += 50
        return own_rows(images)

    def reward(images, prompts, metadata):
        clock.now += 3
        return np.zeros(len(images), np.float32), np.ones(len(images), bool)

    monkeypatch.setattr(sharding, "own_rows", drawn_late)
    monkeypatch.setattr(
        "flowgrpo_jax.scoring.pending.time", SimpleNamespace(perf_counter=lambda: clock.now)
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    records = [{"prompt": str(i)} for i in range(16)]
    scorer = Scorer(RewardWeights({"late": 1.0}), {"late": reward}, records, mesh, threads=1)
    ids = np.arange(16, dtype=np.int32)
    images, rows = sharding.split_rows(mesh, (PICTURES, ids))
    with PendingScores(scorer, ids) as pending:
        pending.add(Pictures(images, jnp.ones(16, bool)), {}, rows)
        pending.collect(Stop().wait)
    ((begun, end),) = pending.calls
    assert end - begun == 3


def test_a_reward_that_computes_with_jax_is_refused_inside_of_a_program():
    """On one core both would wait for each other, and on a GPU always. Outside it may."""

    def reward(images, prompts, metadata):
        means = jnp.asarray(images).astype(jnp.float32).mean((1, 2, 3))
        return np.asarray(means), np.ones(len(images), bool)

    limited = {"mean": host.Limited(reward, 60.0)}
    score = host.composite(limited, lambda ids: [{"prompt": ""} for _ in ids])
    ids = np.arange(len(PICTURES), dtype=np.int32)
    np.testing.assert_allclose(score(PICTURES, ids)["mean"], PICTURES.mean((1, 2, 3)), rtol=1e-5)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    inside = jax.jit(host.callback(score, ("mean",), mesh, sharding.ROWS))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"set reward\.host_call='overlap'"):
        jax.block_until_ready(inside(PICTURES, ids))


def test_callback_and_overlap_agree_on_one_device():
    compare_calls(1)


def test_callback_and_overlap_agree_on_eight_devices():
    """Each device's share is scored once, by itself, and comes back to its place."""
    here = Path(__file__).parent
    program = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8);"
        " import test_reward_calls; test_reward_calls.compare_calls(8)"
    )
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
