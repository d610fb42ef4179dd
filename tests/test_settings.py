"""Values that make no sense are errors that name the knob and the fix."""

import math

import pytest
from changed_recipe import load
from ml_collections import ConfigDict

from flowgrpo_jax.assembly import settings


def tasks(**settings):
    return ConfigDict({"draw": {"train": "shapes:train", **settings}})


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


def test_an_adapter_that_is_not_there_needs_no_alpha_and_no_targets():
    settings.check(load("base", {"lora.rank": 0, "lora.alpha": 0.0, "lora.targets": ()}))
