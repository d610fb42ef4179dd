"""Parts of the entry points that need no model: evaluation's record, and where a LoRA is."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from flowgrpo_jax import algorithms, evaluate, generate, seeds, update
from flowgrpo_jax.checkpoints import policies, run_checkpoints, run_record
from flowgrpo_jax.configs import shapes
from flowgrpo_jax.models import base_model, sd3
from flowgrpo_jax.models.base_model import BaseModel
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.lora_files import write
from flowgrpo_jax.storage import logs

RESULT = {"metrics": {"shapes": 0.5}, "per_tag": {"colors": {"shapes": 0.5}}, "failed": 0.0}


def test_an_evaluation_says_what_it_is_of():
    config = shapes.get_config()
    record = evaluate.record(config, "runs/shapes", RESULT)
    assert json.loads(json.dumps(logs.plain(record))).keys() == record.keys()
    assert {name: record[name] for name in RESULT} == RESULT
    assert (record["checkpoint"], record["model"]) == ("runs/shapes", "shapes")
    assert record["prompts"] == "shapes:test"
    assert record["versions"] == run_checkpoints.versions()
    assert record["config"] == config.eval.to_dict()


def test_an_evaluation_of_several_tasks_names_their_prompts():
    config = shapes.get_config()
    config.prompts.train = config.prompts.test = ""
    config.prompts.tasks = ConfigDict(
        {"draw": {"train": "shapes:train", "test": "shapes:test"}, "write": {"train": "ocr:train"}}
    )
    prompts = evaluate.record(config, "base", RESULT)["prompts"]
    assert prompts == {"draw": "shapes:test", "write": ""}


@pytest.mark.parametrize("seed", [-1, seeds.MOST + 1, 10**30])
def test_a_seed_that_gives_the_numbers_of_another_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed={seed}: must be at least 0 and at most 4294967295"):
        generate.generate(None, {}, ["a cat"], seed=seed)


def test_the_seeds_that_are_taken_give_different_keys():
    """And the next ones do not, which is why they are refused."""
    kept = [jax.random.key_data(jax.random.key(seed)).tolist() for seed in (0, 1, seeds.MOST)]
    assert len({tuple(key) for key in kept}) == 3
    assert jax.random.key_data(jax.random.key(seeds.MOST + 1)).tolist() in kept


@pytest.fixture
def models(tmp_path):
    """Two models of equal shapes and other weights, and a copy of the first: transformers alone."""
    for i, name in enumerate(("one/base", "other/base", "copy/of-it")):
        folder = tmp_path / name / "transformer"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        weights = {"proj_out.weight": np.full((2, 2), i % 2, np.float32)}
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return [str(tmp_path / name) for name in ("one/base", "other/base", "copy/of-it")]


def test_a_model_is_known_by_its_weights_and_not_by_its_place(models):
    one, other, copy = (BaseModel(name, base_model.mark(Path(name))) for name in models)
    assert one.mark == copy.mark != other.mark
    for mark in (one.mark, ""):  # of a run, and of an export, which has the name alone
        then = BaseModel(one.name, mark)
        assert not base_model.is_another(then, one)
        assert not base_model.is_another(then, copy)
        assert base_model.is_another(then, other)
    assert base_model.is_another(BaseModel(one.name + "/transformer"), other)  # as PEFT has it
    assert not base_model.is_another(BaseModel(), one)  # a file that says nothing


@pytest.mark.parametrize(
    "then, now, another",
    [
        ("stabilityai/stable-diffusion-3.5-medium", "/data/stable-diffusion-3.5-medium", False),
        ("stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large", True),
        ("/gone/base/transformer", "/data/base", False),
        ("shapes", "signs", True),
    ],
)
def test_without_weights_to_compare_the_names_decide(then, now, another):
    assert base_model.is_another(BaseModel(then), BaseModel(now)) == another


@pytest.mark.parametrize("marked", [True, False])
def test_a_run_of_another_base_is_not_resumed(models, marked):
    one, other, copy = (BaseModel(name, base_model.mark(Path(name))) for name in models)
    record = {"config": {"model": {"path": one.name}}} | ({"base": one.mark} if marked else {})
    run_record.same_base(record, one, "run")
    run_record.same_base(record, copy, "run")
    names = f"from the base model {one.name}, and the config has model.path={other.name}, which"
    with pytest.raises(ValueError, match=f"run was trained {names} .*config.model.path={one.name}"):
        run_record.same_base(record, other, "run")
    if marked:
        with pytest.raises(ValueError, match=f"{one.name}, whose weights have changed since"):
            run_record.same_base(record, one._replace(mark=other.mark), "run")


def test_a_policy_of_another_base_is_used_with_a_warning(models, tmp_path, caplog):
    spec = LoRASpec(2, 4.0, ("attn.to_q",))
    write({}, spec, tmp_path / "lora", models[0])
    for name in models:
        model = SimpleNamespace(
            name=name, directory=Path(name), lora_spec=spec, trained_shapes={}, base={}
        )
        policies.load(tmp_path / "lora", model)
    (warning,) = [record.getMessage() for record in caplog.records]
    wanted = f"from the base model {models[0]} and is used here with {models[1]}, which has other"
    assert wanted in warning


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/20", "best"])
def test_a_run_is_to_be_exported_first(tmp_path, inside):
    run = tmp_path / "run"
    (run / "checkpoints" / "20").mkdir(parents=True)
    (run / "best").mkdir()
    (run / "config.json").write_text("{}")
    hint = f"no LoRA at {run / inside}.*python -m flowgrpo_jax.export --workdir {run} --out DIR"
    with pytest.raises(FileNotFoundError, match=hint):
        generate.read_spec(run / inside)


def test_no_run_and_no_lora(tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA at") as caught:
        generate.read_spec(tmp_path)
    assert "export" not in str(caught.value)


def test_an_export_in_a_work_directory_is_read(tmp_path):
    """Where the config lies and checkpoints are."""
    spec = LoRASpec(2, 4.0, ("attn.to_q",))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    write({}, spec, tmp_path / "lora", "model")
    assert generate.read_spec(tmp_path / "lora") == spec


@pytest.fixture(scope="module")
def drawn():
    """A function that draws one prompt of the bundled model in two steps."""
    model = sd3.load("shapes", lora_spec=LoRASpec(1, 1.0, sd3.JOINT_ATTENTION))
    adapter = policies.load("base", model)
    return lambda prompt, guidance: generate.generate(
        model, adapter, [prompt], steps=2, guidance=guidance, seed=3
    )


def test_a_guidance_of_at_most_one_draws_the_prompt_alone(drawn):
    """Model cards of distilled models ask for 0, which diffusers takes for no guidance."""
    red, blue = (drawn(prompt, 1.0) for prompt in ("a red circle", "a blue square"))
    assert (red != blue).any()
    np.testing.assert_array_equal(drawn("a red circle", 0.0), red)
    np.testing.assert_array_equal(drawn("a blue square", 0.5), blue)


@pytest.mark.parametrize("scale", [-3.0, float("nan"), float("inf")])
def test_a_guidance_that_makes_no_sense(scale, drawn):
    with pytest.raises(ValueError, match=rf"guidance={scale}: .*at least 0"):
        drawn("a red circle", scale)


def small_state(algorithm="nft"):
    row = algorithms.load(algorithm, {})
    memory = {"rewards": jnp.array([[jnp.nan, 1.5]])}
    policy = {"a/lora_a": jnp.ones((2, 3))}
    return update.init(policy, row.copies, memory, update.optimiser(0.1), jax.random.key(0))


def kept(workdir, algorithm="nft"):
    config = {
        "seed": 0,
        "lora": {"alpha": 1.0},
        "algorithm": {"name": algorithm},
        "advantage": {"name": "per_prompt"},
    }
    return run_checkpoints.RunCheckpoints(workdir, config, BaseModel(), keep=None, best="")


def test_copies_and_memory_are_resumed(tmp_path):
    """What an algorithm and its advantages keep from epoch to epoch is part of the state."""
    state = small_state()
    state = state.replace(copies={**state.copies, "old": {"a/lora_a": jnp.full((2, 3), 7.0)}})
    run = kept(tmp_path)
    run.save(3, state)
    run.close()
    again, epoch = kept(tmp_path).resume(small_state())
    assert epoch == 3 and set(again.copies) == {"ema", "old"}
    jax.tree.map(np.testing.assert_array_equal, again.replace(key=0), state.replace(key=0))


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"format": None}, r"written by another version .*format 1, .*from format 2"),
        ({"config": {"algorithm": {"name": "awm"}}}, r"trained with algorithm\.name=awm, .*nft"),
    ],
)
def test_a_state_that_cannot_go_on_is_refused_by_name(tmp_path, change, problem):
    run, state = kept(tmp_path), small_state()
    record = {k: v for k, v in (run._record(1) | change).items() if v is not None}
    run.last.save(1, state, record)
    run.close()
    with pytest.raises(ValueError, match=problem):
        kept(tmp_path).resume(state)
