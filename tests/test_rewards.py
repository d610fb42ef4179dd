"""Rewards: against PIL's files and rendered scenes, guarded, combined, and called in two ways."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from flowgrpo_jax import advantages, prompts, rewards, sharding
from flowgrpo_jax.assembly import parts
from flowgrpo_jax.command_line import cli
from flowgrpo_jax.configs import ocr as ocr_recipe
from flowgrpo_jax.configs import shapes
from flowgrpo_jax.rewards import geneval, imagereward, ocr, remote
from flowgrpo_jax.rewards import shapes as shapes_rewards
from flowgrpo_jax.scoring import graph, host
from flowgrpo_jax.scoring.pending import PendingScores
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer, Source, check_records
from flowgrpo_jax.types import GraphReward, Pictures
from flowgrpo_jax.worlds.shapes import grammar
from flowgrpo_jax.worlds.shapes.render import Thing, render

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, size=(16, 8, 8, 3), dtype=np.uint8)


def score(name, images, metadata=None):
    """Scores of one reward, all of them valid."""
    metadata = metadata or [{}] * len(images)
    scores, valid = rewards.load([name])[name](images, [""] * len(images), metadata)
    assert scores.shape == valid.shape == (len(images),) and valid.all()
    return scores


# ------------------------------------------------------------------------------- the rewards


def test_jpeg_is_the_size_of_the_file(tmp_path):
    flat = np.full((64, 64, 3), 200, np.uint8)
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 4, flat.shape)
    noise = RNG.integers(0, 256, size=flat.shape, dtype=np.uint8)
    pictures = np.stack([noise, flat, ramp])
    sizes = []
    for picture in pictures:
        Image.fromarray(picture).save(tmp_path / "picture.jpg", quality=95)
        sizes.append((tmp_path / "picture.jpg").stat().st_size)
    ours = score("jpeg_incompressibility", pictures)
    np.testing.assert_allclose(ours * 500_000, sizes, rtol=1e-6)
    assert ours[1] < ours[2] < ours[0]
    np.testing.assert_array_equal(score("jpeg_compressibility", pictures), -ours)


@pytest.mark.parametrize("tag", grammar.TAGS)
def test_shapes_pay_for_what_the_prompt_says(tag):
    pool = grammar.prompts("all", tag)
    asked = [pool[i] for i in RNG.choice(len(pool), 6, replace=False)]
    right = np.stack([render(grammar.sample_scene(m, RNG)) for m in asked])
    wrong = np.stack([render(grammar.sample_scene(grammar.garble(m, RNG), RNG)) for m in asked])
    assert (score("shapes", right, asked) == 1).all()
    assert (score("shapes_strict", right, asked) == 1).all()
    assert (score("shapes", wrong, asked) < 1).all()
    assert (score("shapes_strict", wrong, asked) == 0).all()
    assert (score("shapes_unknown", right) == 0).all()


def test_shapes_say_early_what_they_cannot_judge():
    for metadata in grammar.prompts("all"):
        shapes_rewards.graded.check(metadata)
    with pytest.raises(ValueError, match="need `include`"):
        shapes_rewards.strict.check({"prompt": "a red circle"})
    for clause, words in (
        ({"class": "dog", "count": 1}, "class must be one of .*'circle'"),
        ({"class": "star", "count": 9}, "count must be one of"),
        ({"class": "star"}, "count must be one of"),
        ({"class": "star", "count": 1, "color": "brown"}, "color must be one of .*'red'"),
        ({"class": "star", "count": 1, "position": ["inside", 0]}, "position must be one of"),
        ({"class": "star", "count": 1, "position": ["above", 0]}, "an earlier include clause"),
        ({"class": "star", "count": 1, "position": ["above"]}, "position must be one of"),
        ({"class": "star", "count": 1, "position": "above"}, "position must be one of"),
        ({"class": "star", "count": 2.0}, "count must be one of"),
        ("star", r"include=\['star'\]: must be a list"),
    ):
        with pytest.raises(ValueError, match=words):
            shapes_rewards.strict.check({"include": [clause]})
    star = {"class": "star", "count": 1}
    second = star | {"position": ["above", 0.0]}  # a number that went through a float column
    with pytest.raises(ValueError, match="an earlier include clause"):
        shapes_rewards.strict.check({"include": [star, second]})


def test_shapes_unknown_is_the_share_of_objects_without_a_shape():
    circle = render((Thing("circle", "red", 45.0, 45.0, 10.0),))
    bar, blank = render(()), render(())
    bar[5:11, 5:45] = (20, 20, 20)
    both = np.minimum(circle, bar)
    scores = score("shapes_unknown", np.stack([circle, bar, both, blank]))
    np.testing.assert_allclose(scores, [0, 1, 0.5, 0])


def test_an_unknown_name_is_an_error_that_lists_the_others():
    with pytest.raises(ValueError, match=r"'beauty' is unknown.*jpeg_compressibility.*shapes"):
        rewards.load(["shapes", "beauty"])


def test_the_ocr_recipe_evaluates_by_the_papers_rule_as_well(monkeypatch):
    """Full marks to what the paper's reward pays for and ours does not: the target, twice."""
    monkeypatch.setattr(ocr, "recogniser", lambda *_: lambda image: "STOP stop")
    config = ocr_recipe.get_config()
    made = rewards.load(config.eval.rewards, config.reward.options.to_dict())
    scores = {name: r(PICTURES[:1], ['a sign "Stop"'], [{}])[0][0] for name, r in made.items()}
    assert scores == {"ocr": 0, "ocr_exact": 0, "ocr_lenient": 1}


def test_an_option_that_a_reward_does_not_have_is_named():
    options = {"ocr": {"strict": True, "stricter": True}}
    with pytest.raises(ValueError, match=r"reward\.options of ocr, .*argument 'stricter'"):
        rewards.load(["ocr"], options)
    with pytest.raises(ValueError, match=r"reward\.options of geneval, .*argument 'detectr'"):
        rewards.load(["geneval"], {"geneval": {"detectr": "small"}})


def test_a_row_that_shares_options_may_have_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(ocr, "make", lambda **options: seen.append(options))
    rewards.load(["ocr_lenient", "ocr"], {"ocr": {"workers": 2, "strict": True}})
    rewards.load(["ocr_lenient"], {"ocr_lenient": {"workers": 3}, "ocr": {"workers": 2}})
    assert seen == [
        {"workers": 2, "strict": False, "exact": False},
        {"workers": 2, "strict": True},
        {"workers": 3, "strict": False, "exact": False},
    ]


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    """Its file and its row, taken from the page, are a reward."""
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    file, row = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert file.startswith("# flowgrpo_jax/rewards/brightness.py") and len(file.splitlines()) <= 12
    (tmp_path / "brightness.py").write_text(file)
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path)])
    for name, place in ast.literal_eval("{" + row + "}").items():
        monkeypatch.setitem(rewards.TABLE, name, place)
    images = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 51, 255)])
    scores, valid = rewards.load(["brightness"])["brightness"](images, [""] * 3, [{}] * 3)
    np.testing.assert_allclose(scores, [0, 0.2, 1], rtol=1e-6)
    assert scores.dtype == np.float32 and valid.all()


def test_the_documentation_has_a_line_for_every_row():
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    lines = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    listed = [name for line in lines for name in re.findall(r"`(\w+)`", line[1])]
    assert sorted(listed) == sorted(rewards.TABLE)
    for line in lines:  # a cost that was measured, or what it depends on
        assert re.search(r"\d (ms|GFLOP)|none more|request", line[-2]), line[1]


def test_a_row_may_be_used_several_times(monkeypatch):
    """Two servers: each under a name of its own, with what they share said once."""
    seen = []
    monkeypatch.setattr(remote, "make", lambda **options: seen.append(options) or len(seen))
    options = {
        "remote": {"secret_env": "S"},
        "remote:a": {"urls": ["http://a"]},
        "remote:b": {"urls": ["http://b"], "secret_env": "T"},
    }
    assert rewards.load(["remote:a", "remote:b"], options) == {"remote:a": 1, "remote:b": 2}
    assert seen == [
        {"secret_env": "S", "urls": ["http://a"]},
        {"secret_env": "T", "urls": ["http://b"]},
    ]
    with pytest.raises(ValueError, match="'far:a' cannot be imported"):
        rewards.load(["far:a"])


# ------------------------------------------------------------------------ guarded and combined


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


# ----------------------------------------------------------------------------- in the graph


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


# ----------------------------------------------------------------------- called in two ways


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
        overlapped = pending.collect(cli.Stop().wait)
    mean = 255 - PICTURES.reshape(16, -1).mean(1)
    expected = np.stack([np.where(ids != 5, 1000 * ids + mean, np.nan), mean])
    np.testing.assert_allclose(overlapped.values, expected, rtol=1e-6)
    np.testing.assert_array_equal(overlapped.values, [called[name] for name in overlapped.names])


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
        " import test_rewards; test_rewards.compare_calls(8)"
    )
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
