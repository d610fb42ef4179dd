"""Training as a user starts it: runs are complete, and their figures are explained."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from short_runs import ROOT, call, load, rows, timeless

from flowgrpo_jax import algorithms, rewards, sharding
from flowgrpo_jax.assembly import parts
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.models import sd3
from flowgrpo_jax.train import train
from flowgrpo_jax.types import GraphReward


def test_a_run_leaves_everything_behind(runs, half):
    expected = load(runs, epochs=2).to_dict()
    expected["model"]["path"] = "model"  # as the command, which ran in that directory, was told
    assert json.loads((half / "config.json").read_text()) == json.loads(json.dumps(expected))
    first, second, last = rows(half)
    assert [first["epoch"], second["epoch"], last["epoch"]] == [0, 1, 2]
    for row in (first, second):
        # A window that reaches the last but one step, whose noise is tiny, magnifies rounding.
        assert row["ratio_gap"] < 1e-5 and row["images_per_second"] > 0
        assert row["reward"] == pytest.approx(20 * row["reward/jpeg_incompressibility"], rel=1e-5)
        assert row["grad_norm"] > 0 and row["failed"] == row["skipped"] == 0
        assert row["window_start"] in (0, 1)
    evaluated = {"eval/jpeg_incompressibility", "eval/shapes_strict"}
    assert evaluated <= set(first) and evaluated <= set(last) and not evaluated & set(second)
    assert {p.name for p in (half / "samples").iterdir()} == {"epoch-00000.png", "epoch-00002.png"}
    assert min(Image.open(half / "samples" / "epoch-00002.png").size) > 64
    assert Checkpoints(half / "checkpoints").steps() == [1, 2]
    (events,) = (half / "tensorboard").iterdir()
    assert b"ratio_gap" in events.read_bytes()


def test_the_model_in_the_box_trains(runs):
    box = {"model__path": "shapes", "model__height": 64, "model__width": 64}
    state = train(load(runs, epochs=1, eval__every=0, **box), runs / "box")
    (row,) = rows(runs / "box")
    assert int(state.step) == 2 and row["grad_norm"] > 0 and row["ratio_gap"] < 1e-5


def test_every_figure_and_file_of_a_run_is_explained(half):
    explained = re.findall(r"`([^`]+)`", (ROOT / "docs" / "running.md").read_text())
    figures = {key.split("/")[0] for row in rows(half) for key in row} - {"epoch"}
    figures |= {name for row in algorithms.TABLE for name in algorithms.load(row, {}).figures}
    written = {f.name + "/" * f.is_dir() for f in half.iterdir()}
    assert {"reward", "eval", "grad_norm"} < figures and "metrics.jsonl" in written
    named = {name.split("/")[0] for name in explained}
    assert figures <= named and {name.removesuffix("/") for name in written} <= named


def test_prompts_that_were_encoded_ahead_need_no_encoder(runs, half, monkeypatch):
    """And train as those that are encoded on the way, but for rounding: other batches of texts.

    The first epoch shows it; after an update of Adam from small gradients rounding has grown."""
    texts = runs / "texts"
    arguments = "--config=tiny.py", "--epochs=2", f"--config.model.text_cache={texts}"
    out = call(runs, "encode", *arguments)
    count = len(list(texts.iterdir()))
    assert f"{count} prompts are in {texts}" in out and 10 < count <= 1 + 4 + 12

    def load_weights(directory, *args, **kwargs):
        assert "text_encoder" not in directory.name, "an encoder was loaded"
        return real(directory, *args, **kwargs)

    real = sd3.convert.load
    monkeypatch.setattr(sd3.convert, "load", load_weights)
    train(load(runs, epochs=2, model__text_cache=str(texts)), runs / "ahead")
    ours, theirs = rows(runs / "ahead"), rows(half)
    assert len(ours) == len(theirs)
    assert timeless(ours[0]) == pytest.approx(timeless(theirs[0]), rel=1e-3, abs=1e-5)


def test_encoding_reads_the_encoders_alone(runs, monkeypatch):
    """It is for devices that are too small for all of the model at once."""
    real, read = sd3.convert.load, []

    def load_weights(directory, *args, **kwargs):
        read.append(directory.name)
        return real(directory, *args, **kwargs)

    monkeypatch.setattr(sd3.convert, "load", load_weights)
    model = parts.load_model(load(runs), sharding.make_mesh(), texts_alone=True)
    assert read == [] and model.encode(["a circle"])["tokens"].shape[0] == 1
    assert sorted(read) == ["text_encoder", "text_encoder_2", "text_encoder_3"]


def test_prompts_are_encoded_in_few_numbers_of_rows(runs):
    """Each number is compiled. A prompt's conditioning does not depend on the prompts beside it."""
    model = parts.load_model(load(runs), sharding.make_mesh(), texts_alone=True)
    texts = [f"{n} red circles" for n in ("one", "two", "three", "four", "five")] * 2
    alone, many, most = (model.encode(texts[:n]) for n in (1, 8, 9))
    assert model.encode_text._cache_size() == 2  # for 8 rows, and for 16
    for name, x in most.items():
        assert [part[name].shape[0] for part in (alone, many, most)] == [1, 8, 9]
        np.testing.assert_allclose(alone[name][0], x[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(many[name][:3], x[5:8], rtol=1e-4, atol=1e-5)


def test_training_changes_the_policy(whole):
    state = whole.state
    assert int(state.step) == 8
    # The last block drops the text tokens' output, so their queries there have no effect.
    moved = [
        float(abs(v).max())
        for k, v in state.policy.items()
        if k.endswith("lora_b") and not k.endswith("2:3/attn/add_q_proj/lora_b")
    ]
    assert min(moved) > 0
    assert any((state.policy[k] != state.copies["ema"][k]).any() for k in state.policy)
    first, *_, last = rows(whole.workdir)
    assert first["eval/jpeg_incompressibility"] != last["eval/jpeg_incompressibility"]


def test_callback_and_overlap_train_alike(runs, whole):
    config = load(runs, epochs=1, eval__every=0, reward__host_call="callback")
    train(config, runs / "callback")
    (ours,), theirs = rows(runs / "callback"), rows(whole.workdir)[0]
    assert timeless(ours) == pytest.approx(timeless(theirs, prefix="eval/"), rel=1e-4, abs=1e-6)


def test_the_warning_comes_before_the_update(runs, monkeypatch):
    """Of the first update alone; in a recipe with two."""
    config = load(runs, epochs=1, eval__every=0)
    order, build = [], build_run

    def watched(config):
        run = build(config)
        apply = run.programs.apply

        def noted(*args):
            order.append("update")
            return apply(*args)

        return dataclasses.replace(
            run,
            programs=dataclasses.replace(run.programs, apply=noted),
            algorithm=dataclasses.replace(
                run.algorithm, warning=lambda figures: order.append("warning") or ""
            ),
        )

    monkeypatch.setattr("flowgrpo_jax.train.build_run", watched)
    train(config, runs / "warned")
    assert order == ["warning", "update", "update"]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3), dtype=np.float32), np.ones(len(images), bool)


def brightness_in_graph(scale):
    return GraphReward(
        weights=np.float32(scale),
        prepare=lambda prompts, metadata: np.zeros(len(prompts)),
        score=lambda weights, images, _: weights * images.astype(np.float32).mean((1, 2, 3)),
    )


@pytest.mark.parametrize("advantage", ["group", "gdpo"])
def test_a_reward_trains_alike_on_the_host_and_in_the_graph(runs, monkeypatch, advantage):
    monkeypatch.setitem(rewards.TABLE, "host", f"{__name__}:brightness")
    monkeypatch.setitem(rewards.TABLE, "graph", f"{__name__}:brightness_in_graph()")
    states = []
    for name in ("host", "graph"):
        config = load(runs, epochs=1, eval__every=0, advantage__name=advantage)
        config.train.eps, config.train.learning_rate = 1.0, 1.0  # steps follow the gradient
        config.reward.weights = ConfigDict({name: 1.0, "jpeg_incompressibility": 5.0})
        config.reward.options = ConfigDict({"graph": {"scale": 1.0}} if name == "graph" else {})
        states.append(train(config, runs / f"in-{name}-{advantage}"))
        (row,) = rows(runs / f"in-{name}-{advantage}")
        assert 0 < row[f"reward/{name}"] < 255 and row["failed"] == 0
    assert any(np.abs(x).max() > 0 for k, x in states[0].policy.items() if "lora_b" in k)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * float(np.abs(b).max())),
        states[0].policy,
        states[1].policy,
    )
