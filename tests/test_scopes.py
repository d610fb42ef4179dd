"""Group and epoch rewards: which images they are given, whatever the cut and whatever fails."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.stats import rankdata
from short_runs import load, rows

from flowgrpo_jax import prompts, rewards, sharding
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.command_line.stop import Stop
from flowgrpo_jax.evaluate import evaluate
from flowgrpo_jax.scoring.host import Limited
from flowgrpo_jax.scoring.pending import PendingScores, calls_of
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.train import train
from flowgrpo_jax.types import Pictures, scope_of

RNG = np.random.default_rng(0)
GROUPS, SIZE = 3, 4
PICTURES = RNG.integers(0, 256, size=(GROUPS * SIZE, 8, 8, 3), dtype=np.uint8)
TRAINED = np.repeat([5, 0, 2], SIZE)  # each image's prompt in training, group after group
TESTED = np.array([1, 0, 3, 1, 2, 0, 1, 3, 1, 0, 1, 4])  # in an evaluation
RECORDS = [{"prompt": str(i), "task": "odd" if i % 2 else "even"} for i in range(6)]


def rank(images, texts, metadata):
    """The image's rank by brightness among those that it is given, from 0 to 1."""
    assert len(set(texts)) == 1
    place = rankdata(images.mean((1, 2, 3))) - 1
    return place / max(len(images) - 1, 1), np.ones(len(images), bool)


def distance(images, prompts, metadata):
    """How far the image's colour is from the mean colour of all that it is given."""
    colours = images.mean((1, 2))
    return np.linalg.norm(colours - colours.mean(0), axis=1), np.ones(len(images), bool)


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)), np.ones(len(images), bool)


rank.scope, distance.scope = "group", "epoch"
LOADED = {"brightness": brightness, "rank": rank, "distance": distance}


def ranks(pictures, ids):
    """By scipy, prompt for prompt."""
    wanted = np.zeros(len(ids))
    for i in set(ids.tolist()):
        place = rankdata(pictures[ids == i].mean((1, 2, 3))) - 1
        wanted[ids == i] = place / max(len(place) - 1, 1)
    return wanted


def distances(pictures):
    colours = pictures.reshape(len(pictures), -1, 3).mean(1)
    return np.sqrt(((colours - colours.mean(0)) ** 2).sum(1))


def collect(scorer, pictures, ids, micro, finite=None):
    """The scores of pictures that are added `micro` at a time; the last ones are padded."""
    finite = np.ones(len(ids), bool) if finite is None else finite
    padded = np.arange(-(-len(ids) // micro) * micro) % len(ids)
    with PendingScores(scorer, ids) as pending:
        for part in np.split(padded, len(padded) // micro):
            shown = sharding.split_rows(scorer.mesh, (pictures[part], finite[part]))
            pending.add(Pictures(*shown), {}, jnp.zeros(micro, int))
        return pending.collect(Stop().wait)


def make(loaded, weights=None, **options):
    weights = weights or RewardWeights(dict.fromkeys(loaded, 1.0))
    return Scorer(weights, loaded, RECORDS, sharding.make_mesh(), **options)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("micro", [1, 2, 3, 4, 5, 6, 12])
@pytest.mark.parametrize("ids", [TRAINED, TESTED], ids=["training", "evaluation"])
def test_the_cut_does_not_change_what_rewards_see(ids, micro, threads):
    scores = collect(make(LOADED, threads=threads), PICTURES, ids, micro)
    wanted = PICTURES.reshape(12, -1).mean(1), ranks(PICTURES, ids), distances(PICTURES)
    np.testing.assert_allclose(scores.values, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores.weights, np.ones((3, 12)))
    assert scores.names == ("brightness", "rank", "distance") and scores.broken == 0


def test_a_picture_that_is_not_finite_is_left_out():
    """It has no score, and those of the others are as if it had never been drawn."""
    finite = np.ones(12, bool)
    finite[[1, 8, 9, 10, 11]] = False  # one of a group, and a whole group
    scores = collect(make(LOADED), PICTURES, TRAINED, 3, finite)
    assert np.isnan(scores.values[:, ~finite]).all() and scores.failed[:, ~finite].all()
    wanted = ranks(PICTURES[finite], TRAINED[finite]), distances(PICTURES[finite])
    np.testing.assert_allclose(scores.values[1:, finite], wanted, rtol=1e-5, atol=1e-6)
    assert scores.broken == pytest.approx(5 / 12)


def test_a_task_of_other_rewards_is_not_in_the_epoch():
    """An epoch reward is given the images of the prompts that it is for."""
    weights = RewardWeights({"rank": 1.0}, {"odd": {"distance": 2.0}, "even": {"rank": 0.5}})
    scores = collect(make(LOADED, weights), PICTURES, TESTED, 5)
    odd = TESTED % 2 == 1
    np.testing.assert_array_equal(np.isnan(scores.weights), [odd, ~odd])
    np.testing.assert_array_equal(np.isnan(scores.values), [odd, ~odd])
    assert not scores.failed.any()
    np.testing.assert_allclose(scores.values[1, odd], distances(PICTURES[odd]), rtol=1e-5)
    even = ranks(PICTURES, TESTED)[~odd]
    np.testing.assert_allclose(scores.values[0, ~odd], even, rtol=1e-5)


def test_a_group_is_scored_while_the_next_one_is_drawn():
    """As soon as the micro-batch after its last image has been dispatched."""
    seen = []

    def noted(images, prompts, metadata):
        seen.append(prompts[0])
        return rank(images, prompts, metadata)

    noted.scope = "group"
    shown = sharding.split_rows(sharding.make_mesh(), (PICTURES[:2], np.ones(2, bool)))
    with PendingScores(make({"rank": noted}), TRAINED) as pending:
        for _ in range(3):
            pending.add(Pictures(*shown), {}, jnp.zeros(2, int))
        until = time.monotonic() + 30
        while not seen and time.monotonic() < until:
            time.sleep(0.01)
    assert seen == ["5"]


def test_every_joint_call_is_given_to_one_process(monkeypatch):
    """Between them the processes score each group and the epoch once."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    done = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with PendingScores(make(LOADED), TESTED) as pending:
            done.append([(call.reward, *call.rows) for call in pending._calls])
    whole = [(call.reward, *call.rows) for call in calls_of(make(LOADED).joint_rewards, TESTED)]
    assert sorted(done[0] + done[1]) == sorted(whole) and abs(len(done[0]) - len(done[1])) <= 1
    assert len(whole) == 5 + 1 and ("distance", *range(12)) in whole


@pytest.mark.parametrize("failure", ["raises", "hangs", "wrong shape", "NaN"])
def test_a_group_reward_that_fails_costs_its_group_alone(failure, caplog):
    def fails(images, prompts, metadata):
        if prompts[0] != "0":
            return rank(images, prompts, metadata)
        if failure == "raises":
            raise RuntimeError("the judge is down")
        if failure == "hangs":
            time.sleep(3.0)
        scores = np.full(SIZE, np.nan)
        return scores[: 1 if failure == "wrong shape" else SIZE], np.ones(SIZE, bool)

    fails.scope = "group"
    scores = collect(
        make({"rank": Limited(fails, 2.0), "distance": distance}), PICTURES, TRAINED, 2
    )
    wanted = np.where(TRAINED == 0, np.nan, ranks(PICTURES, TRAINED))
    np.testing.assert_allclose(scores.values, [wanted, distances(PICTURES)], rtol=1e-5, atol=1e-6)
    assert ("'rank' failed on 4 images" in caplog.text) == (failure != "NaN")


def test_a_reward_that_never_returns_is_not_called_again():
    """The next call waits for it once more; the others are not made."""
    calls = []

    def hangs(images, prompts, metadata):
        calls.append(prompts[0])
        time.sleep(10_000)

    limited, begun = Limited(hangs, 0.2), time.monotonic()
    for _ in range(20):
        with pytest.raises(TimeoutError):
            limited(PICTURES, ["0"] * 12, [{}] * 12)
    assert calls == ["0"] and time.monotonic() - begun < 10  # not 20 times 0.2 + 0.2


def test_a_scope_that_is_none_is_named():
    def whole(images, prompts, metadata):
        return brightness(images, prompts, metadata)

    assert scope_of(whole) == "image" and scope_of(Limited(rank, None)) == "group"
    whole.scope = "batch"
    with pytest.raises(ValueError, match="scope='batch': choose from 'image', 'group', 'epoch'"):
        make({"whole": whole})


# ------------------------------------------------------------------------------------ in a run


@pytest.mark.parametrize("host_call, micro", [("overlap", 2), ("callback", 2), ("overlap", 4)])
def test_a_run_with_groups_and_epochs(runs, monkeypatch, host_call, micro):
    """The ranks of a group of four are 0, 1/3, 2/3 and 1, of which mean and deviation are known;
    those of parts of a group would be others. Beside them a reward of single images goes the way
    that `host_call` says. The others run outside of programs and may compute with JAX."""
    for name in ("rank", "distance", "brightness"):
        monkeypatch.setitem(rewards.TABLE, name, f"{__name__}:{name}")
    seen = []
    monkeypatch.setattr(f"{__name__}.distance", noting(distance, seen))
    config = load(runs, epochs=2, eval__every=2, reward__host_call=host_call)
    config.sample.micro_batch = micro
    config.reward.weights = ConfigDict({"rank": 1.0, "distance": 0.0, "brightness": 0.0})
    config.eval.rewards, config.checkpoint.best = ("rank", "distance"), "rank"
    workdir = runs / f"scopes-{host_call}-{micro}"
    train(config, workdir)
    first, second, last = rows(workdir)
    for row in (first, second):
        assert row["reward"] == pytest.approx(0.5) and row["failed"] == row["dead_groups"] == 0
        assert row["reward_std"] == pytest.approx(np.std([0, 1 / 3, 2 / 3, 1]))
        assert row["reward/distance"] > 0 and 0 < row["reward/brightness"] < 255
        assert row["grad_norm"] > 0
    tested = prompts.load(config.prompts.test)
    groups = np.bincount(prompts.balanced(tested, 12)[0].ids)
    assert last["eval/rank"] == pytest.approx(groups[groups > 1].sum() / 2 / 12)  # alone: 0
    assert seen == [12, 8, 8, 12]  # before training, two epochs, and at the end


def noting(reward, seen):
    def noted(images, prompts, metadata):
        seen.append(len(images))
        return reward(np.asarray(jnp.asarray(images)), prompts, metadata)

    noted.scope = reward.scope
    return noted


def test_an_evaluation_gives_a_reward_the_images_of_a_prompt(runs, monkeypatch):
    """Three prompts are drawn four times each, in micro-batches of five that mix them."""
    monkeypatch.setitem(rewards.TABLE, "rank", f"{__name__}:rank")
    config = load(runs)
    config.reward.weights, config.checkpoint.best = ConfigDict({"rank": 1.0}), "rank"
    config.eval.rewards, config.eval.micro_batch = (), 5
    run = build_run(config, training=False)
    del run.test_prompts[3:]
    for record in run.test_prompts:
        record["tag"] = "one"
    result, _, batch = evaluate(run, policies.load("base", run.model))
    assert np.bincount(batch.ids).tolist() == [4, 4, 4]
    assert result["metrics"]["rank"] == pytest.approx(0.5, abs=1e-6) and result["failed"] == 0


def test_a_group_reward_that_fails_does_not_end_a_run(runs, monkeypatch):
    """Half of the groups have no score, which `reward.max_failed` allows."""
    asked = []

    def half(images, prompts, metadata):
        asked.append(prompts[0])
        if len(asked) % 2:
            raise RuntimeError("the judge is down")
        return rank(images, prompts, metadata)

    half.scope = "group"
    monkeypatch.setitem(rewards.TABLE, "half", f"{__name__}:half")
    monkeypatch.setitem(globals(), "half", half)
    config = load(runs, epochs=1, eval__every=0)
    config.reward.weights = ConfigDict({"half": 1.0})
    train(config, runs / "half-failed")
    (row,) = rows(runs / "half-failed")
    assert len(asked) == 2 and row["failed"] == 0.5 and row["reward"] == pytest.approx(0.5)
