"""The record of a model: another architecture than SD3 trains, resumes and is exported."""

import json

import jax
import numpy as np
import pytest
import ripple
from ml_collections import ConfigDict
from short_runs import rows, same

from flowgrpo_jax import evaluate, export, generate, models
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.configs import shapes
from flowgrpo_jax.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ripple") / "model"
    ripple.write_model(folder)
    return folder


@pytest.fixture
def config(folder):
    c = shapes.get_config()
    c.model.path, c.model.family = str(folder), "ripple:FAMILY"
    c.model.options = ConfigDict()
    c.model.height = c.model.width = 16
    c.epochs, c.lora.rank, c.lora.alpha = 3, 2, 4.0
    c.sample.groups, c.sample.group_size, c.sample.micro_batch = 2, 4, 4
    c.sample.steps, c.sample.window, c.sample.window_range = 4, 2, (0, 3)
    c.sample.guidance_scale = c.eval.guidance_scale = 3.5
    c.reward.weights = ConfigDict({"jpeg_incompressibility": 1.0})
    c.eval.every, c.eval.images, c.eval.micro_batch, c.eval.steps = 3, 4, 4, 2
    c.eval.rewards, c.checkpoint.best = ("jpeg_incompressibility",), ""
    c.checkpoint.every, c.log.tensorboard = 1, False
    return c


@pytest.mark.parametrize("algorithm", ["grpo", "nft", "awm"])
def test_another_architecture_trains_and_resumes(config, tmp_path, algorithm):
    options = {"awm": {"levels": 2}}.get(algorithm, {})
    config.algorithm.name, config.algorithm.options = algorithm, ConfigDict(options)
    whole = train(config, tmp_path / "whole")
    trained = rows(tmp_path / "whole")[:3]
    assert all(np.isfinite(row["reward"]) and row["grad_norm"] > 0 for row in trained)
    if algorithm == "grpo":
        assert max(row["ratio_gap"] for row in trained) < 1e-5
    config.epochs = 2
    train(config, tmp_path / "parts")
    config.epochs = 3
    again = train(config, tmp_path / "parts", resume=True)
    same([again.policy, again.copies, again.key], [whole.policy, whole.copies, whole.key])


def test_the_adapter_of_another_architecture_is_exported_and_drawn_with(config, tmp_path):
    train(config, tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "lora")
    model = ripple.load(config.model.path, lora_spec=ripple.LoRASpec(2, 4.0, ("inner", "outer")))
    adapter = policies.load(tmp_path / "lora", model)
    same(adapter, policies.load(tmp_path / "run", model))
    drawn = {g: generate.generate(model, adapter, ["a"], steps=2, guidance=g) for g in (0.0, 3.0)}
    assert drawn[3.0].shape == (1, 16, 16, 3) and (drawn[0.0] != drawn[3.0]).any()


def test_prompts_are_cached_whatever_their_conditioning_is(config, tmp_path):
    config.model.text_cache = str(tmp_path / "texts")
    one, two = (build_run(config, training=False) for _ in range(2))
    first, again = one.encode(["a", "b"]), two.encode(["a", "b"])
    assert set(first) == {"words"} and len(list((tmp_path / "texts").iterdir())) == 2
    same(first, again)
    assert (
        jax.device_get(one.model.encode(["b"])["words"][0]) == np.asarray(again["words"][1])
    ).all()


def test_the_evaluation_uses_the_schedule_of_the_models_own(config):
    config.model.height = 32
    run = build_run(config, training=False)
    assert run.setup.process.sigmas == (1.0, 0.5625, 0.25, 0.0625, 0.0)
    policy = policies.load("base", run.model)
    result, images, _ = evaluate.evaluate(run, policy)
    assert images.shape == (4, 32, 16, 3) and np.isfinite(
        result["metrics"]["jpeg_incompressibility"]
    )


def test_the_kind_is_read_from_the_model(folder, monkeypatch):
    with pytest.raises(
        ValueError, match=r"model_index\.json has _class_name='RipplePipeline'.*Stable"
    ):
        models.find(folder)
    monkeypatch.setitem(models.TABLE, "RipplePipeline", "ripple:FAMILY")
    assert models.find(folder) is ripple.FAMILY
    assert models.find("shapes") is models.find("stabilityai/stable-diffusion-3.5-large")
    with pytest.raises(ValueError, match=r"model\.family 'ripples:X' cannot be imported"):
        models.find(folder, "ripples:X")


def test_a_directory_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json does not exist.*no model in"):
        models.find(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="_class_name=None"):
        models.find(tmp_path)


def test_options_are_the_models_own(config):
    config.model.options = ConfigDict({"t5": False})
    with pytest.raises(
        ValueError, match=r"config\.model\.options: t5 is unknown; .*takes width=32"
    ):
        build_run(config)


@pytest.mark.parametrize(
    "given, message",
    [
        ("depth=3", r"--option: depth is unknown; .* takes width=32"),
        ("width", r"--option=width: give NAME=VALUE"),
        ("width=true", r"--option=width=true: must be like width=32"),
    ],
)
def test_options_of_the_command_line_are_judged(given, message):
    with pytest.raises(ValueError, match=message):
        generate.read_options(ripple.FAMILY, [given])
    assert generate.read_options(ripple.FAMILY, ["width=8"]) == {"width": 8}
