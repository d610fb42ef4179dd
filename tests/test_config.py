"""Every recipe loads and is sound; what cannot be built of one is said before weights are read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from changed_recipe import load
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from flowgrpo_jax import rewards, sharding
from flowgrpo_jax.assembly import batch_plan, parts, settings
from flowgrpo_jax.assembly.run import build_run, make_programs
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer

ROOT = Path(__file__).parent.parent
DEVICES = (1, 2, 4, 8, 16, 32, 64)
RECIPES = sorted(
    ".".join(file.relative_to(ROOT / "configs").with_suffix("").parts)
    for file in (ROOT / "configs").rglob("[a-z]*.py")
    if file.stem != "variants"  # of recipes, and none itself
)


# -------------------------------------------------------------------------------------- the recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_sound(name):
    config = load(name)
    settings.check(config)
    update = config.sample.groups * config.sample.group_size // config.train.updates_per_epoch
    batch = config.sample.micro_batch or update
    allowed = [devices for devices in DEVICES if batch % devices == 0]
    for devices in allowed:
        batch_plan.make_plan(config, devices)
    assert allowed == list(DEVICES) or (
        ("shapes" in config.name + name or "signs" in name) and 16 in allowed
    )
    if name in ("base", "shapes"):  # the others' rewards need their weights: test_recipes.py
        rewards.load([*config.reward.weights, *config.eval.rewards])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_knobs_of_base_and_no_others(name):
    def knobs(config):
        sections = config.to_dict()
        return {k: set(v) if isinstance(v, dict) else None for k, v in sections.items()}

    assert knobs(load(name)) == knobs(load("base"))


def built(changes):
    config = load("shapes", changes)
    mesh = AbstractMesh((1, 1, 1), sharding.AXES)
    model = parts.describe_model(config, mesh)
    algorithm, plan = parts.make_algorithm(config), batch_plan.make_plan(config, 1)
    setup = parts.make_setup(config, model, algorithm)
    optimiser = parts.make_optimiser(config)
    return make_programs(config, model, mesh, plan, setup, algorithm, optimiser)


def test_training_and_evaluation_take_a_guidance_of_zero_for_none():
    """Their programs are those of a guidance of 1, which configs/shapes.py has; 2 has others."""
    plain = built({})
    assert built({"sample.guidance_scale": 0.0, "eval.guidance_scale": 0.5}) == plain
    guided = built({"sample.guidance_scale": 2.0})
    assert guided.sample is not plain.sample and guided.accumulate is not plain.accumulate
    assert guided.generate is plain.generate


# --------------------------------------------------------------------------------------- the errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh.tensor": 3}, r"mesh\.tensor=3 does not divide the transformer's 4 heads"),
        (
            {"mesh.tensor": 2, "reward.host_call": "callback"},
            r"host_call='callback' with mesh\.tensor=2: every image .* use 'overlap'",
        ),
    ],
)
def test_a_layout_that_makes_no_sense(changes, message, monkeypatch):
    config = load("shapes", changes)
    mesh = AbstractMesh((1, 1, config.mesh.tensor), sharding.AXES)
    model = parts.describe_model(config, mesh)
    loaded = rewards.load(["shapes"])
    scorer = Scorer(RewardWeights({"shapes": 1.0}), loaded, [], mesh)
    algorithm, plan = parts.make_algorithm(config), batch_plan.make_plan(config, 1)
    setup = parts.make_setup(config, model, algorithm)
    with pytest.raises(ValueError, match=message):
        score = scorer.inside_program() if config.reward.host_call == "callback" else None
        make_programs(config, model, mesh, plan, setup, algorithm, None, score)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "shapes",
            {"model.height": 60},
            "60 x 64: .*multiples of 16 px and at most 128, .*64 x 64",
        ),
        (
            "shapes",
            {"model.width": 144},
            "64 x 144: .*multiples of 16 px and at most 128, .*64 x 128",
        ),
        (
            "base",
            {"model.height": 500},
            "500 x 512: .*multiples of 16 px and at most 6144, .*496 x 512",
        ),
    ],
)
def test_a_size_that_the_model_cannot_draw(name, changes, message, monkeypatch):
    """Said before any weights are read, the model's or a reward's."""
    for part in ("load_model", "scorers"):
        monkeypatch.setattr(parts, part, lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(ValueError, match=f"model.height and model.width: image size {message}"):
        build_run(load(name, changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.source": "nowhere"}, r"data\.source='nowhere' is no folder"),
        ({"data.source": "base", "lora.rank": 0}, r"data\.source='base' with lora\.rank=0"),
        ({"advantage.diversity": "dino"}, r"advantage\.diversity='dino': choose from"),
    ],
)
def test_pictures_and_features_that_are_not_there(changes, message, monkeypatch):
    """Said before any weights are read, as above."""
    for part in ("load_model", "scorers"):
        monkeypatch.setattr(parts, part, lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_run(load("shapes", {"data.images": 96, **changes}))


@pytest.mark.parametrize("path", ["/nowhere/sd3", "./sd3", "sd3"])
def test_a_model_that_is_not_there(path):
    with pytest.raises(FileNotFoundError, match=rf"{path}.*config\.model\.path.*hub id"):
        build_run(load("shapes", {"model.path": path}))


def test_an_unknown_reward():
    config = load("shapes")
    config.reward.weights = ConfigDict({"beauty": 1.0})
    with pytest.raises(ValueError, match=r"'beauty' is unknown: choose from .*shapes"):
        build_run(config)


def test_a_misspelt_knob_in_a_recipe():
    with pytest.raises((AttributeError, KeyError), match="group_sise"):
        load("base").sample.group_sise = 4
    with pytest.raises((AttributeError, KeyError), match="smaple"):
        load("base").smaple = {}


def test_a_misspelt_knob_on_the_command_line():
    child = subprocess.run(
        f"{sys.executable} -m flowgrpo_jax.train --config=configs/shapes.py"
        " --config.sample.group_sise=4".split(),
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    said = "error: --config.sample.group_sise is unknown: did you mean --config.sample.group_size"
    assert child.returncode == 1 and child.stderr.startswith(said)
    assert child.stderr.count("\n") == 1
