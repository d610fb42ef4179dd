"""The rewards in the graph and the scorers of a recipe: what they share is placed once, and what
they cannot judge is said early."""

import functools
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from noise_pictures import PICTURES

from flowgrpo_jax import prompts, rewards, sharding
from flowgrpo_jax.assembly import parts
from flowgrpo_jax.configs import shapes
from flowgrpo_jax.rewards import geneval, imagereward
from flowgrpo_jax.rewards import shapes as shapes_rewards
from flowgrpo_jax.scoring import graph
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Source, check_records
from flowgrpo_jax.types import GraphReward
from flowgrpo_jax.worlds.shapes import grammar

# ------------------------------------------------------------------------------------- in the graph


def test_a_reward_in_the_graph_gets_the_rows_of_its_prompts():
    def scaled(weights, images, prepared):
        lengths = prepared["length"] * weights
        return jnp.where(images.mean((1, 2, 3)) > 0, lengths, jnp.inf)

    reward = GraphReward(
        weights=jnp.float32(3.0),
        prepare=lambda prompts, metadata: {"length": np.array([len(p) for p in prompts])},
        score=scaled,
    )
    score = graph.GraphRewards({"length": reward})
    prepared = score.prepare([{"prompt": "a"}, {"prompt": "four"}])
    images = PICTURES[:3].copy()
    images[2] = 0
    scores = score(images, prepared, np.array([1, 0, 1]))
    np.testing.assert_array_equal(scores["length"], [12, 3, np.nan])  # not finite: failed


TOWER = {"kernel": np.full((4, 2), 3.0, np.float32), "bias": np.arange(2.0, dtype=np.float32)}


def on_tower(head):
    """A reward with a head of its own on the weights that several share."""

    def score(weights, images, prepared):
        sums = [x.sum() for x in (*weights["tower"].values(), weights["head"])]
        return jnp.full(len(images), sum(sums))

    return GraphReward({"tower": TOWER, "head": np.float32(head)}, lambda p, m: {}, score)


def test_weights_that_rewards_share_are_placed_once():
    placed = []

    def place(x):
        placed.append(x)
        return jnp.asarray(x)

    pair, once = {"one": on_tower(1), "two": on_tower(2)}, graph.place_once(place)
    training = graph.GraphRewards({"two": pair["two"]}, once)
    testing = graph.GraphRewards(pair, once)
    assert len(placed) == len(TOWER) + 2
    images, rows = PICTURES[:3], np.zeros(3, int)
    for score in (training, testing):
        for name, scores in score(images, {"one": {}, "two": {}}, rows).items():
            np.testing.assert_array_equal(scores, [25 + {"one": 1, "two": 2}[name]] * 3)


def test_an_array_does_not_take_the_place_of_one_that_is_gone():
    """Told apart by identity, which Python gives to the next array when one is gone."""
    once = graph.place_once(lambda x: x.copy())
    for n in range(50):
        np.testing.assert_array_equal(once({"w": np.full(1000, n)})["w"], n)


# -------------------------------------------------------------------------------------- of a recipe


@pytest.mark.parametrize("training", [True, False])
def test_a_recipe_s_scorers_place_what_they_share_once(training, monkeypatch):
    placed = []
    names = ("trained", "watched", "tested")
    for name in names:
        monkeypatch.setitem(rewards.TABLE, name, f"{__name__}:on_tower()")
    monkeypatch.setattr(sharding, "replicate", lambda mesh, x: placed.append(x) or jnp.asarray(x))
    config = shapes.get_config()
    config.reward.weights = ConfigDict({"trained": 1.0, "watched": 0.0})
    config.reward.options = ConfigDict({name: {"head": 1} for name in names})
    config.eval.rewards, config.checkpoint.best = ("watched", "tested"), "tested"
    records = [{"prompt": "a"}]
    scorer, test_scorer = parts.scorers(
        config, sharding.make_mesh(), records, records, training=training
    )
    tested, trained = test_scorer.in_graph.weights, scorer.in_graph.weights
    assert test_scorer.weights.names == tuple(tested) == ("watched", "tested")
    assert scorer.weights.names == tuple(trained) == ("trained", "watched") * training
    assert len(placed) == len(TOWER) + (3 if training else 2)


@pytest.mark.parametrize("every, tested", [(0, [grammar.single_object("star")]), (5, [])])
def test_a_run_that_never_evaluates_loads_no_rewards_for_it(every, tested, monkeypatch):
    config = shapes.get_config()
    config.eval.rewards, config.eval.every = ("imagereward",), every
    monkeypatch.setattr(imagereward, "make", lambda **options: pytest.fail("it was loaded"))
    scorer, test_scorer = parts.scorers(config, sharding.make_mesh(), tested, tested)
    assert scorer.weights.names == ("shapes",) and test_scorer.weights.names == ()


def test_a_prompt_that_a_reward_cannot_judge_is_named_by_file_and_line(tmp_path):
    """Arrow leaves null for absent keys in GenEval's records; the last of these is wrong."""
    clause = {"class": "cup", "count": 1, "color": None, "position": None}
    rows = [
        {"tag": "single_object", "include": [clause], "exclude": None, "prompt": "a cup"},
        {"tag": "colors", "include": [clause | {"color": "red"}], "prompt": "a red cup"},
        {"tag": "colors", "include": [clause | {"color": "mauve"}], "prompt": "a mauve cup"},
    ]
    file = tmp_path / "geneval.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    config = shapes.get_config()
    config.prompts.train = str(file)
    loaded = {"geneval": SimpleNamespace(check=geneval.check)}
    records, weights = prompts.load(str(file)), RewardWeights({"geneval": 1.0})
    place = functools.partial(parts.prompt_place, config, "train")
    check_records(loaded, Source(weights, records[:2], place))
    with pytest.raises(ValueError, match=r"geneval\.jsonl: line 3: reward 'geneval': .*'mauve'"):
        check_records(loaded, Source(weights, records, place))


def test_prompts_that_a_reward_cannot_judge_are_an_early_error(monkeypatch):
    """Only those that it is for."""

    def check(record):
        if "class" not in record:
            raise ValueError(f"{record['prompt']!r} has no class")

    def graded(images, prompts, metadata):
        return np.zeros(len(images)), np.ones(len(images), bool)

    graded.check = check
    monkeypatch.setattr(shapes_rewards, "graded", graded)
    config = shapes.get_config()
    config.eval.every = 0
    good, bad = {"prompt": "a", "class": "x", "task": "one"}, {"prompt": "b", "task": "two"}
    parts.scorers(config, sharding.make_mesh(), [good], [bad])
    with pytest.raises(ValueError, match="'b' has no class"):
        parts.scorers(config, sharding.make_mesh(), [good, bad], [])
    config.reward.weights = ConfigDict({"shapes": 1.0, "jpeg_compressibility": 1.0})
    config.prompts.tasks = ConfigDict({"one": {"rewards": ("shapes",)}, "two": {}})
    with pytest.raises(ValueError, match="'b' has no class"):  # a task without a list takes all
        parts.scorers(config, sharding.make_mesh(), [good, bad], [])
    config.prompts.tasks = ConfigDict(
        {"one": {"rewards": ("shapes",)}, "two": {"rewards": ("jpeg_compressibility",)}}
    )
    parts.scorers(config, sharding.make_mesh(), [good, bad], [])
