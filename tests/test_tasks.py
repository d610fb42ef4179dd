"""Several tasks in one run: whose prompts, how often, and which rewards."""

import json
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict

from flowgrpo_jax import prompts
from flowgrpo_jax.assembly import settings
from flowgrpo_jax.configs import base
from flowgrpo_jax.prompts import tasks
from flowgrpo_jax.scoring.reward_weights import RewardWeights


@pytest.fixture
def sources(tmp_path):
    """Two tasks' files: 10 untagged prompts, and 40 of two tags."""
    (tmp_path / "signs.txt").write_text("\n".join(f'a sign "{n}"' for n in range(10)))
    rows = [f'{{"prompt": "scene {n}", "tag": "{"ab"[n % 2]}"}}' for n in range(40)]
    (tmp_path / "scenes.jsonl").write_text("\n".join(rows))
    return {"signs": str(tmp_path / "signs.txt"), "scenes": str(tmp_path / "scenes.jsonl")}


def test_a_record_says_which_task_it_is_of(sources):
    records = tasks.mixture(sources)
    assert records[0] == {"prompt": 'a sign "0"', "task": "signs", "tag": "signs"}
    assert records[10] == {"prompt": "scene 0", "task": "scenes", "tag": "a"}
    assert Counter(r["task"] for r in records) == {"signs": 10, "scenes": 40}


def test_tasks_come_as_often_as_their_weights(sources):
    """Whatever the number of their prompts; tag weights work within the task that has the tags."""
    records = tasks.mixture(sources)
    settings = dict(tag_weights={"a": 1.0, "b": 3.0}, task_weights={"signs": 1.0, "scenes": 3.0})
    drawn = Counter()
    for epoch in range(1600):
        (record,) = prompts.sample(records, 1, seed=0, epoch=epoch, **settings).metadata
        drawn[record["task"], record["tag"]] += 1
    wanted = {("signs", "signs"): 1 / 4, ("scenes", "a"): 3 / 16, ("scenes", "b"): 9 / 16}
    assert set(drawn) == set(wanted)
    for kind, share in wanted.items():
        assert abs(drawn[kind] - 1600 * share) < 4.5 * (1600 * share * (1 - share)) ** 0.5


def test_without_weights_tasks_are_equal(sources):
    records = tasks.mixture(sources)
    p = prompts.frequencies(records, {}, tasks.weights({name: {} for name in sources}))
    np.testing.assert_allclose(p, [1 / 20] * 10 + [1 / 80] * 40)


def test_a_task_of_its_own_in_a_plain_file_changes_nothing(tmp_path):
    """Data sets have such a key, of any type; only prompts.tasks makes tasks."""
    rows = [{"prompt": f"p{n}", "task": "t2i"} for n in range(99)]
    rows += [{"prompt": "lonely", "task": ["edit", 1]}]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    records = prompts.load(str(tmp_path / "p.jsonl"))
    assert records == rows
    np.testing.assert_allclose(prompts.frequencies(records, {}, {}), np.full(100, 1 / 100))
    assert (RewardWeights({"shapes": 2.0}).table(records) == 2.0).all()
    within = tasks.mixture({"draw": str(tmp_path / "p.jsonl")})
    np.testing.assert_allclose(prompts.frequencies(within, {}, {"draw": 1.0}), np.full(100, 0.01))


def test_a_weight_for_a_task_that_is_not_there(sources):
    with pytest.raises(ValueError, match=r"prompts\.tasks names \['x'\].*tasks are \['signs'\]"):
        prompts.sample(
            tasks.mixture({"signs": sources["signs"]}), 2, seed=0, epoch=0, task_weights={"x": 1}
        )


def test_a_test_of_one_task_is_kept_out_of_all():
    chosen = {
        "compose": {"train": "geneval:train", "test": "geneval:test"},
        "compose_more": {"train": "geneval:train"},
        "write": {"train": "ocr:train", "weight": 0.5, "rewards": ("ocr",)},
    }
    train, test = tasks.splits(chosen)
    assert {r["task"] for r in train} == set(chosen) and {r["task"] for r in test} == {"compose"}
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert tasks.weights(chosen) == {"compose": 1.0, "compose_more": 1.0, "write": 0.5}


def test_which_rewards_a_task_has():
    chosen = {"a": {"rewards": ("x", "y")}, "b": {"rewards": ("y",)}, "c": {}}
    weights = {"x": 1.0, "y": 2.0, "watched": 0.0}
    assert tasks.reward_weights(chosen, weights) == {
        "a": weights,
        "b": {"y": 2.0, "watched": 0.0},
        "c": weights,
    }
    assert tasks.reward_weights({}, weights) == {}


def test_rows_that_judge_as_another_otherwise_go_where_it_goes():
    """Else the monitors of one task would be asked about the prompts of the others."""
    chosen = {
        "compose": {"rewards": ("geneval",)},
        "write": {"rewards": ("ocr", "ocr_exact")},
        "all": {},
    }
    names = (
        "geneval",
        "geneval_strict",
        "geneval_strict:b",
        "ocr",
        "ocr_exact",
        "ocr_lenient",
        "aesthetic",
    )
    weights = dict.fromkeys(names, 0.0)
    of = {task: set(found) for task, found in tasks.reward_weights(chosen, weights).items()}
    assert of == {
        "compose": {"geneval", "geneval_strict", "geneval_strict:b", "aesthetic"},
        "write": {"ocr", "ocr_exact", "ocr_lenient", "aesthetic"},
        "all": set(names),
    }


@pytest.mark.parametrize(
    "task, message",
    [
        ({"train": "x.txt", "wieght": 2}, r"tasks\.a has \['wieght'\]: choose from train, test"),
        ({"test": "x.txt"}, r"tasks\.a has no train: name a prompt source"),
        ({"train": "x.txt", "rewards": ("z",)}, r"tasks\.a\.rewards names \['z'\].*\['jpeg_comp"),
        ({"train": "x.txt", "rewards": ("ocr",)}, r"tasks\.a has no reward that trains it"),
        ({"train": "x.txt", "rewards": ("shapes",)}, r"tasks\.a has no reward that trains it"),
    ],
)
def test_a_task_that_makes_no_sense(task, message):
    c = base.get_config()
    c.reward.weights = ConfigDict({"jpeg_compressibility": 1.0, "ocr": 0.0})
    c.eval.rewards = ("shapes",)
    other = {"train": "y.txt", "rewards": ("jpeg_compressibility",)}  # or it were for all tasks
    c.prompts.tasks = ConfigDict({"a": task, "b": other})
    with pytest.raises(ValueError, match=message):
        settings.check(c)


def test_tasks_and_a_single_source():
    c = base.get_config()
    c.reward.weights = ConfigDict({"jpeg_compressibility": 1.0})
    c.prompts.train, c.prompts.tasks = "ocr:train", ConfigDict({"a": {"train": "ocr:train"}})
    with pytest.raises(ValueError, match=r"prompts\.tasks takes the place of prompts\.train"):
        settings.check(c)


def test_tasks_take_turns_by_their_names(sources):
    records, weights = tasks.mixture(sources), {"signs": 1.0, "never": 0.0, "scenes": 2.0}
    turns = [tasks.turn(weights, epoch) for epoch in range(3)]
    assert [max(turn, key=turn.get) for turn in turns] == ["scenes", "signs", "scenes"]
    assert [sum(turn.values()) for turn in turns] == [1, 1, 1]
    turns = [{name: turn[name] for name in sources} for turn in turns]
    drawn = [prompts.sample(records, 5, seed=0, epoch=0, task_weights=turn) for turn in turns]
    assert [{r["task"] for r in batch.metadata} for batch in drawn] == [
        {"scenes"},
        {"signs"},
        {"scenes"},
    ]
    with pytest.raises(ValueError, match=r"prompts\.alternate=True: .* prompts\.tasks has 1; name"):
        tasks.check({"signs": {"train": "x"}}, {"jpeg": 1.0}, (), alternate=True)
    idle = {name: {"train": "x", "weight": 0.0} for name in sources}
    with pytest.raises(ValueError, match=r"alternate=True: .*prompts\.tasks\.NAME\.weight .*0: "):
        tasks.check(idle, {"jpeg": 1.0}, (), alternate=True)


def test_the_shapes_of_one_tag_are_a_source():
    records = prompts.load("shapes:train:position")
    assert {record["tag"] for record in records} == {"position"} and len(records) == 96
