"""The paper's recipes end to end.

A run is of the real recipe and its real prompts on a tiny random model of SD3.5's layout. A reward
that cannot run here gives its place to JPEG compressibility.
"""

import importlib
import json
import math

import pytest
from ml_collections import ConfigDict

from flowgrpo_jax import rewards
from flowgrpo_jax.train import train


def load(name, variant):
    return importlib.import_module(f"flowgrpo_jax.configs.{name}").get_config(variant)


def runs_here(name):
    """Of the recipes' own rewards, only OCR brings its weights along (with its extra)."""
    if name != "ocr" or name not in rewards.TABLE:
        return False
    try:
        return bool(rewards.load([name]))
    except ImportError:
        return False


def tiny(config, checkpoint, tmp_path):
    """The recipe at a size that takes seconds; its prompts, kernels and losses are as they were."""
    c = config
    c.epochs, c.model.path, c.model.dtype = 2, str(checkpoint), "float32"
    c.model.height = c.model.width = 16
    c.model.options.t5_length, c.lora.rank, c.lora.alpha = 8, 2, 4.0
    c.sample.groups, c.sample.group_size, c.sample.micro_batch = 4, 4, 8
    c.sample.steps, c.eval.steps = 6, 2
    c.eval.every, c.eval.images, c.eval.micro_batch, c.eval.grid = 2, 6, 8, 4
    c.log.tensorboard = False
    own = {
        name: 0.0 for name in c.reward.weights if runs_here(name)
    }  # noise scores alike: no signal
    options = {name: c.reward.options[name] for name in own if name in c.reward.options}
    c.reward.weights = ConfigDict({"jpeg_compressibility": 1.0, **own})
    c.reward.options, c.eval.rewards = ConfigDict(options), tuple(c.reward.weights)
    c.checkpoint.best = "jpeg_compressibility"
    if c.prompts.train.startswith("flow_grpo"):
        for split in ("train", "test"):
            lines = [f"a {split} picture of {n} cats, cinematic light" for n in range(30)]
            (tmp_path / f"{split}.txt").write_text("\n".join(lines))
            c.prompts[split] = str(tmp_path / f"{split}.txt")
    return c


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name, variant, changes",
    [
        ("geneval", "full", {}),
        ("ocr", "full", {}),
        ("pickscore", "full", {}),
        ("geneval", "fast", {"model.options.t5": False}),
        ("ocr", "single_gpu", {"model.options.t5": False}),
    ],
)
def test_two_epochs_and_an_evaluation(name, variant, changes, checkpoint, tmp_path):
    config = tiny(load(name, variant), checkpoint, tmp_path)
    config.update_from_flattened_dict(changes | {"model.text_cache": str(tmp_path / "texts")})
    state = train(config, tmp_path / "run")
    assert int(state.step) == 4
    first, second, last = rows(tmp_path / "run")
    for row in (first, second):
        assert row["failed"] == 0 and row["grad_norm"] > 0 and row["ratio_gap"] < 1e-4
        assert all(math.isfinite(row[f"reward/{name}"]) for name in config.reward.weights)
        assert (row["kl"] > 0) == (variant == "full")
    evaluated = {f"eval/{name}" for name in config.eval.rewards}
    assert evaluated <= set(first) and evaluated <= set(last)
    tags = {k.split("/")[1] for k in last if k.count("/") == 2}
    six = {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert tags == (six if name == "geneval" else set())
    texts = 2 * 4 + 6 + 1  # both epochs', the evaluation's and the empty one
    assert len(list((tmp_path / "texts").iterdir())) in range(texts - 2, texts + 1)


@pytest.mark.parametrize("name, variant", [("geneval", "awm"), ("ocr", "nft")])
def test_an_epoch_of_another_algorithm(name, variant, checkpoint, tmp_path):
    config = tiny(load(name, variant), checkpoint, tmp_path)
    config.model.options.t5, config.epochs, config.eval.every = False, 1, 0
    config.sample.steps = 9  # AWM has six levels in nine tenths of them
    train(config, tmp_path / "run")
    (row,) = rows(tmp_path / "run")
    assert row["failed"] == 0 and row["grad_norm"] > 0
    assert row.get("ratio_gap", 0) == 0  # AWM's old log-prob is its own


def test_the_small_detector_trains(checkpoint, tmp_path):
    """On noise it sees nothing, so that a picture's size tells one from another."""
    try:
        rewards.load(["geneval"], {"geneval": {"detector": "small"}})
    except ImportError as error:
        pytest.skip(str(error))
    c = tiny(load("geneval", "fast"), checkpoint, tmp_path)
    c.reward.weights = ConfigDict({"geneval": 1.0, "jpeg_compressibility": 1e-3})
    c.reward.options = ConfigDict({"geneval": {"detector": "small"}})
    c.eval.rewards = ("geneval", "geneval_strict", "geneval_official")
    c.checkpoint.best = "geneval_strict"
    train(c, tmp_path / "run")
    first, second, last = rows(tmp_path / "run")
    for row in (first, second):
        assert row["failed"] == 0 and row["grad_norm"] > 0
        assert 0 <= row["reward/geneval"] < 0.5
    assert last["eval/geneval_strict"] <= last["eval/geneval"] < 0.5
    assert (tmp_path / "run" / "best").is_dir()


def test_two_tasks_in_one_run(checkpoint, tmp_path):
    """GenEval's prompts rewarded for small files and signs for large ones, and evaluated so."""
    c = tiny(load("geneval", "fast"), checkpoint, tmp_path)
    c.model.options.t5 = False
    c.prompts.train = c.prompts.test = ""
    c.prompts.tasks = ConfigDict(
        {
            "compose": {
                "train": "geneval:train",
                "test": "geneval:test",
                "rewards": ("jpeg_compressibility",),
            },
            "write": {
                "train": "ocr:train",
                "test": "ocr:test",
                "rewards": ("jpeg_incompressibility",),
            },
        }
    )
    c.reward.weights = ConfigDict({"jpeg_compressibility": 1.0, "jpeg_incompressibility": 1.0})
    c.eval.rewards, c.eval.images = tuple(c.reward.weights), 7
    train(c, tmp_path / "run")
    first, second, last = rows(tmp_path / "run")
    assert first["grad_norm"] > 0 and first["failed"] == second["failed"] == 0
    small, large = (f"jpeg_{kind}ressibility" for kind in ("comp", "incomp"))
    assert last[f"eval/write/{small}"] is None and last[f"eval/write/{large}"] > 0
    assert last[f"eval/position/{large}"] is None and last[f"eval/position/{small}"] < 0
