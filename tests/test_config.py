"""Every recipe loads and is sound; what is not is an error that names the value and the fix."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from flowgrpo_jax import rewards, sharding
from flowgrpo_jax.assembly import batch_plan, parts, recipe, settings
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer

ROOT = Path(__file__).parent.parent
DEVICES = (1, 2, 4, 8, 16, 32, 64)
RECIPES = sorted(
    ".".join(file.relative_to(ROOT / "configs").with_suffix("").parts)
    for file in (ROOT / "configs").rglob("[a-z]*.py")
    if file.stem != "variants"  # of recipes, and none itself
)


def load(name, changes=None):
    """A recipe with some knobs changed: {"sample.steps": 4}."""
    config = importlib.import_module(f"flowgrpo_jax.configs.{name}").get_config()
    if not config.reward.weights:  # base.py leaves the choice to the recipes
        config.reward.weights = ConfigDict({"jpeg_compressibility": 1.0})
    config.update_from_flattened_dict(changes or {})
    return config


def tasks(**settings):
    return ConfigDict({"draw": {"train": "shapes:train", **settings}})


# ------------------------------------------------------------------------------ the recipes


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


# --------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    "updates, micro_batch, size, count",
    [
        (2, 0, 4, 144),  # 0: derived, 4 of 512 px a device
        (2, 9, 9, 64),
        (2, 32, 32, 18),
        (2, 144, 144, 4),
        (1, 576, 576, 2),
        (1, 24, 24, 48),
        (48, 8, 8, 3),  # a group an update
    ],
)
def test_plan_of_the_papers_48_groups_of_24(updates, micro_batch, size, count):
    changes = {"train.updates_per_epoch": updates, "sample.micro_batch": micro_batch}
    plan = batch_plan.make_plan(load("base", changes), devices=1)
    assert (plan.images, plan.updates) == (1152, updates)
    assert (plan.micro_batch, plan.micro_batches) == (size, count)
    assert plan.images == updates * count * size
    for number in (48, 24, 1152, updates, count, size):
        assert str(number) in str(plan).split()


def test_the_plan_does_not_depend_on_the_devices_that_share_it():
    config = load("base", {"sample.micro_batch": 32})
    assert len({batch_plan.make_plan(config, devices) for devices in (1, 2, 8, 32)}) == 1


@pytest.mark.parametrize(
    "side, devices, size",
    [
        (512, 4, 16),
        (512, 8, 32),
        (512, 16, 64),
        (512, 64, 192),
        (1024, 8, 8),
        (64, 1, 192),
        (64, 8, 576),
    ],
)
def test_a_micro_batch_is_derived(side, devices, size):
    """The largest divisor of an update's 576 images with few enough pixels for each device."""
    config = load("base", {"model.height": side, "model.width": side})
    assert batch_plan.make_plan(config, devices).micro_batch == size


# ------------------------------------------------------------------------------- the errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sample.group_size": 1}, r"sample\.group_size=1: .*at least 2"),
        (
            {"sample.groups": 48, "train.updates_per_epoch": 5},
            r"sample\.groups=48 .*multiple of train\.updates_per_epoch=5",
        ),
        ({"train.updates_per_epoch": 0}, r"train\.updates_per_epoch=0"),
        (
            {"sample.micro_batch": 100},
            r"sample\.micro_batch=100 .*576 images.*8 equal parts: choose from .*96, .*or 0",
        ),
        ({"sample.micro_batch": -4}, r"sample\.micro_batch=-4"),
        (
            {"sample.micro_batch": 36},
            r"sample\.micro_batch=36 .*8 equal parts: choose from .*24, 32, 48, .*or 0",
        ),
        (
            {"sample.micro_batch": 32, "eval.micro_batch": 12},
            r"eval\.micro_batch=12 .*8 equal parts.*a multiple of 8, or 0",
        ),
    ],
)
def test_batch_arithmetic_that_does_not_come_out_even(changes, message):
    with pytest.raises(ValueError, match=message):
        batch_plan.make_plan(load("base", changes), devices=8)


@pytest.mark.parametrize(
    "name, least, message",
    [
        ("dgpo", 24, r"dgpo needs whole groups in each: choose from 24, 48, 72, .*or 0"),
        ("crd", 576, r"crd needs all of them in one: choose from 576, or 0"),
    ],
)
def test_a_micro_batch_that_has_to_be_whole(name, least, message):
    """The derived one grows beyond what is at once elsewhere; one of half a group is refused."""
    algorithm = ConfigDict({"name": name, "options": {}})
    changes = {"algorithm": algorithm, "sample.micro_batch": 0}
    assert batch_plan.make_plan(load("base", changes), devices=1).micro_batch == least
    with pytest.raises(ValueError, match=r"sample\.micro_batch=12 .*" + message):
        batch_plan.make_plan(load("base", changes | {"sample.micro_batch": 12}), devices=1)
    config = load("base", changes | {"sample.micro_batch": least})
    assert batch_plan.make_plan(config, devices=8).micro_batch == least


@pytest.mark.parametrize("micro_batch", [0, 10])
@pytest.mark.parametrize(
    "batch, devices, of, parts",
    [((5, 20, 1), 8, 2, 4), ((48, 24, 2), 256, 64, 64), ((6, 7, 3), 4, 12, 2)],
)
def test_an_update_that_the_devices_do_not_divide(batch, devices, of, parts, micro_batch):
    """No micro-batch helps there. The error says what does, and it does."""
    knobs = ("sample.groups", "sample.group_size", "train.updates_per_epoch")
    config = load("base", dict(zip(knobs, batch)) | {"sample.micro_batch": micro_batch})
    fix = rf"sample\.groups to a multiple of {of},.*mesh\.tensor .* {parts} parts"
    with pytest.raises(
        ValueError, match=rf"images of an update.*{devices} equal parts.*{fix}"
    ) as e:
        batch_plan.make_plan(config, devices)
    assert all(knob in str(e.value) for knob in knobs) and "micro_batch" not in str(e.value)
    config.sample.micro_batch = 0
    batch_plan.make_plan(config, parts)
    for n in (1, 3):
        config.sample.groups = n * of
        batch_plan.make_plan(config, devices)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sample.kernel": "ode"}, r"kernel 'ode' is unknown: choose from .*cps.*flow_sde"),
        ({"sample.density": "t"}, r"sample\.density='t': choose from .*'gaussian'"),
        ({"advantage.name": "prompt"}, r"advantage 'prompt' is unknown: choose from .*group"),
        ({"algorithm.name": "ppo"}, r"algorithm 'ppo' is unknown: choose from .*grpo"),
        (
            {"algorithm.name": "nft"},
            r"algorithm\.options of nft: centering, clip_range, .*nft takes beta",
        ),
        ({"reward.host_call": "http"}, r"reward\.host_call='http': .*'overlap', 'callback'"),
        ({"model.dtype": "int8"}, r"model\.dtype='int8': choose from 'float32', 'bfloat16'$"),
        ({"model.dtype": "float16"}, r"model\.dtype='float16': .*no loss scaling.*use 'bfloat16'"),
        ({"sample.noise_level": 0.0}, r"sample\.noise_level=0\.0: .*no log-prob.*0\.7"),
        (
            {"sample.kernel": "cps", "sample.noise_level": 1.2},
            r"sample\.noise_level=1\.2: .*at most 1",
        ),
        ({"sample.steps": 1}, r"sample\.steps=1: .*at least 2"),
        (
            {"sample.window": 10},
            r"sample\.window=10 does not fit.*first 9 of 10 steps.*choose 1 to 9, or 0 for all",
        ),
        ({"sample.window": -1}, r"sample\.window=-1 does not fit.*choose 1 to 9"),
        (
            {"sample.window": 3, "sample.window_range": (0, 2)},
            r"sample\.window=3 does not fit .*sample\.window_range=\(0, 2\): choose 1 to 2$",
        ),
        (
            {"sample.window_range": (2, 5)},  # the window is 0, and no 9 was written
            r"sample\.window=0, .*does not fit .*sample\.window_range=\(2, 5\): choose 1 to 3$",
        ),
        (
            {"sample.window_range": (4, 12), "sample.window": 2},
            r"sample\.window_range=\(4, 12\): .*first 9 of 10 steps.*0 <= low < high <= 9",
        ),
        ({"sample.window_range": (3,)}, r"sample\.window_range=\(3,\): must be two numbers"),
        (
            {"sample.window_schedule": "sliding"},
            r"sample\.window_schedule 'sliding' is unknown: choose from decay, .*random",
        ),
        (
            {"sample.window": 2, "sample.window_schedule": "progressive"},
            r"sample\.window_range=\(0, 2\) leaves .* no room to move: widen it",
        ),
        (
            {"sample.window_options": ConfigDict({"every": 3})},
            r"sample\.window_options of random: every is unknown",
        ),
        ({"sample.solver": "heun"}, r"solver 'heun' is unknown: choose from dpmpp_2m, euler"),
        ({"eval.solver": "heun"}, r"solver 'heun' is unknown: choose from dpmpp_2m, euler"),
        ({"sample.tail": 0.0}, r"sample\.tail=0\.0: .*above 0 and at most 1"),
        ({"sample.tail": 1.5}, r"sample\.tail=1\.5: .*above 0 and at most 1"),
        (
            {"sample.neighbor_noise": 0.3, "sample.branches": 4},
            r"neighbor_noise=0\.3: .*needs sample\.branches=1",
        ),
        (
            {"sample.neighbor_noise": 1.0},
            r"neighbor_noise=1\.0: .*must be in \[0, 1\)",
        ),
        (
            {
                "sample.solver": "dpmpp_2m",
                "algorithm": ConfigDict({"name": "draft", "options": {}}),
            },
            r"sample\.solver: draft differentiates .* by 'euler'",
        ),
        (
            {"sample.tail": 0.5, "algorithm": ConfigDict({"name": "nft", "options": {}})},
            r"sample\.tail=0\.5: nft draws without a window.*set 1",
        ),
        (
            {"sample.window": 4, "algorithm.options.steps": 5},
            r"options\.steps=5: .*4 steps.*choose 1 to 4, or 0",
        ),
        ({"algorithm.options.clip_range": 0.0}, r"options\.clip_range=0\.0: .*above 0"),
        ({"train.ema_decay": 1.0}, r"train\.ema_decay=1\.0: .*\[0, 1\)"),
        ({"train.b1": 1.0}, r"train\.b1=1\.0: .*\[0, 1\)"),
        ({"train.b2": -0.1}, r"train\.b2=-0\.1: .*\[0, 1\)"),
        ({"train.eps": 0.0}, r"train\.eps=0\.0: .*above 0"),
        ({"lora.rank": -1}, r"lora\.rank=-1: .*at least 1, or 0 to train all"),
        ({"lora.alpha": 0.0}, r"lora\.alpha=0\.0: .*above 0.*64"),
        (
            {"prompts.tag_weights": ConfigDict({"position": -1.0})},
            r"prompts\.tag_weights\.position=-1\.0: .*at least 0",
        ),
        (
            {"prompts.tasks": tasks(weight=-2.0)},
            r"prompts\.tasks\.draw\.weight=-2\.0: .*at least 0",
        ),
        ({"reward.max_failed": 1.5}, r"reward\.max_failed=1\.5: .*\[0, 1\]"),
        ({"reward.max_failed": -0.1}, r"reward\.max_failed=-0\.1: .*\[0, 1\]"),
        ({"checkpoint.best": "beauty"}, r"checkpoint\.best='beauty' is not evaluated: choose from"),
        ({"checkpoint.every": 0}, r"checkpoint\.every=0: .*at least 1"),
        ({"checkpoint.keep": -1}, r"checkpoint\.keep=-1: .*at least 0"),
        ({"eval.images": 0}, r"eval\.images=0: .*at least 1"),
        ({"seed": -1}, r"seed=-1: .*at least 0"),
        ({"cpu_devices": -2}, r"cpu_devices=-2: .*at least 0"),
        ({"model.attention": "ring"}, r"attention='ring': choose from 'auto', 'xla', 'cudnn'"),
        ({"model.text_cache": "gs://b/texts"}, r"text_cache='gs://b/texts': .*on this machine"),
        (
            {"seed": 2**32},
            r"seed=4294967296: must be at least 0 and at most 4294967295",
        ),
        ({"seed": -1}, r"seed=-1: must be at least 0"),
        ({"eval.seed": 2**32}, r"eval\.seed=4294967296: .*at most 4294967295"),
        ({"eval.seed": -1}, r"eval\.seed=-1: must be at least 0"),
        ({"model.height": 0}, r"model\.height=0: .*at least 1"),
        ({"algorithm.options.kl_beta": -0.1}, r"options\.kl_beta=-0\.1: .*at least 0"),
        ({"advantage.clip": -5.0}, r"advantage\.clip=-5\.0: .*above 0"),
        ({"train.max_grad_norm": 0.0}, r"train\.max_grad_norm=0\.0: .*above 0"),
        ({"reward.timeout": -1.0}, r"reward\.timeout=-1\.0: .*at least 0"),
        ({"reward.threads": 0}, r"reward\.threads=0: .*at least 1"),
        ({"eval.micro_batch": -8}, r"eval\.micro_batch=-8: .*at least 0"),
        ({"reward.weights": ConfigDict()}, r"reward\.weights=\{\}: name at least one"),
        (
            {"reward.options": ConfigDict({"ocrr": {"strict": True}})},
            r"reward 'ocrr' is unknown: choose from .*ocr",
        ),
        (
            {"reward.weights": ConfigDict({"shapes": 0.0})},
            r"reward\.weights=.*'shapes': 0\.0.*is not 0",
        ),
        (
            {"reward.weights": ConfigDict({"shapes": "high"})},
            r"reward\.weights\.shapes='high': must be a number",
        ),
        ({"sample.strides": (1, 1.5)}, r"sample\.strides: 1\.5 must be a whole number"),
        ({"sample.splits": ("a",)}, r"sample\.splits: 'a' must be a whole number"),
        ({"sample.window_range": (0, "x")}, r"sample\.window_range: 'x' must be a whole number"),
        ({"sample.guidance_scale": -3.0}, r"sample\.guidance_scale=-3\.0: .*at least 0"),
        ({"eval.guidance_scale": -0.5}, r"eval\.guidance_scale=-0\.5: .*at least 0"),
    ],
)
def test_a_value_that_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        settings.check(load("base", changes))


REALS = [
    path for path, value in settings.leaves("", load("base").to_dict()) if type(value) is float
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("knob", REALS)
def test_every_real_knob_is_finite(knob, value):
    if knob in settings.UNLIMITED and value == math.inf:
        settings.check(load("base", {knob: value}))
        return
    with pytest.raises(ValueError, match=rf"^{knob}={value}: "):
        settings.check(load("base", {knob: value}))


@pytest.mark.parametrize(
    "changes, knob",
    [
        ({"reward.weights": ConfigDict({"shapes": math.nan})}, "reward.weights.shapes"),
        ({"prompts.tag_weights": ConfigDict({"a": math.nan})}, "prompts.tag_weights.a"),
        ({"prompts.tasks": tasks(weight=math.inf)}, "prompts.tasks.draw.weight"),
        ({"reward.options": ConfigDict({"ocr": {"x": math.nan}})}, "reward.options.ocr.x"),
        ({"reward.options": ConfigDict({"ocr": {"x": (1, math.nan)}})}, "reward.options.ocr.x"),
    ],
)
def test_weights_and_options_are_finite(changes, knob):
    with pytest.raises(ValueError, match=rf"^{knob}=.*finite"):
        settings.check(load("base", changes))


def test_every_checkpoint_can_be_kept():
    settings.check(load("base", {"checkpoint.keep": 0}))


@pytest.mark.parametrize("scale, taken", [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.5, 1.5)])
def test_a_guidance_of_at_most_one_is_none(scale, taken):
    """As in diffusers, whose pipelines guide where the scale is above 1."""
    assert settings.guidance(scale, "guidance") == taken


def built(changes):
    config = load("shapes", changes)
    mesh = AbstractMesh((1, 1, 1), sharding.AXES)
    model = parts.describe_model(config, mesh)
    algorithm, plan = parts.make_algorithm(config), batch_plan.make_plan(config, 1)
    setup = parts.make_setup(config, model, algorithm)
    optimiser = parts.make_optimiser(config)
    return recipe.make_programs(config, model, mesh, plan, setup, algorithm, optimiser)


def test_training_and_evaluation_take_a_guidance_of_zero_for_none():
    """Their programs are those of a guidance of 1, which configs/shapes.py has; 2 has others."""
    plain = built({})
    assert built({"sample.guidance_scale": 0.0, "eval.guidance_scale": 0.5}) == plain
    guided = built({"sample.guidance_scale": 2.0})
    assert guided.sample is not plain.sample and guided.accumulate is not plain.accumulate
    assert guided.generate is plain.generate


@pytest.mark.parametrize(
    "changes, cores, devices",
    [
        ({}, 2, 2),
        ({}, 10, 9),  # 144 images at once are not cut in ten
        ({"sample.micro_batch": 0}, 7, 6),  # a micro-batch to be derived: of 288 images
        ({"eval.micro_batch": 14}, 8, 2),
        ({"cpu_devices": 1}, 8, 1),
        ({"cpu_devices": 3}, 8, 3),
        ({"mesh.data": 1}, 8, 1),  # a mesh that is given in full says how many
        ({"mesh.data": 2, "mesh.tensor": 2}, 2, 4),
        ({"mesh.fsdp": 2}, 9, 8),
    ],
)
def test_a_cpu_is_split_as_the_batch_can_be(changes, cores, devices, monkeypatch):
    chosen = {}
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(settings.jax.config, "update", chosen.__setitem__)
    settings.split_cpu(config := load("shapes", changes))
    assert chosen.get("jax_num_cpu_devices", 1) == devices
    if not config.cpu_devices:
        batch_plan.make_plan(config, devices)  # and it divides all


def test_who_has_split_the_cpu_keeps_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setattr(settings.jax.config, "update", lambda *_: pytest.fail("split again"))
    settings.split_cpu(load("shapes", {}))


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
        recipe.make_programs(config, model, mesh, plan, setup, algorithm, None, score)


def test_an_adapter_that_is_not_there_needs_no_alpha_and_no_targets():
    settings.check(load("base", {"lora.rank": 0, "lora.alpha": 0.0, "lora.targets": ()}))


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
        recipe.build(load(name, changes))


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
        recipe.build(load("shapes", {"data.images": 96, **changes}))


@pytest.mark.parametrize("path", ["/nowhere/sd3", "./sd3", "sd3"])
def test_a_model_that_is_not_there(path):
    with pytest.raises(FileNotFoundError, match=rf"{path}.*config\.model\.path.*hub id"):
        recipe.build(load("shapes", {"model.path": path}))


def test_an_unknown_reward():
    config = load("shapes")
    config.reward.weights = ConfigDict({"beauty": 1.0})
    with pytest.raises(ValueError, match=r"'beauty' is unknown: choose from .*shapes"):
        recipe.build(config)


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
