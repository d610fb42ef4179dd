"""The paper's recipes and their variants: sound on every device count, and what they set."""

import configparser
import importlib
import inspect
import re
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from flowgrpo_jax import rewards
from flowgrpo_jax.assembly import batch_plan, parts, settings
from flowgrpo_jax.rewards import geneval

ROOT = Path(__file__).parent.parent
RECIPES = ("geneval", "ocr", "pickscore")
VARIANTS = ("full", "fast", "single_gpu")  # those of GRPO
EACH = [(name, variant) for name in RECIPES for variant in VARIANTS]


def load(name, *variant):
    return importlib.import_module(f"flowgrpo_jax.configs.{name}").get_config(*variant)


@pytest.mark.parametrize("name, variant", EACH)
def test_a_variant_is_sound_and_has_the_papers_groups(name, variant):
    config = load(name, variant)
    settings.check(config)
    for devices in (1, 2, 4, 8, 16, 32, 64):
        plan = batch_plan.make_plan(config, devices)
        assert (plan.groups, plan.group_size, plan.updates) == (48, 24, 2)
        assert plan.micro_batches * plan.micro_batch * 2 == 1152
    assert config.name == (name if variant == "full" else f"{name}-{variant}")


@pytest.mark.parametrize("name, beta", [("geneval", 0.04), ("ocr", 0.04), ("pickscore", 0.01)])
def test_full_is_the_papers_table(name, beta):
    """Paper B.3 and upstream's config/grpo.py: KL is all that differs between the tasks."""
    c = load(name)
    assert c.to_dict() == load(name, "full").to_dict()
    assert (c.model.height, c.model.width) == (512, 512)
    assert (c.lora.rank, c.lora.alpha) == (32, 64.0)
    assert (c.sample.steps, c.eval.steps, c.sample.guidance_scale) == (10, 40, 4.5)
    assert (c.sample.kernel, c.sample.noise_level, c.sample.window) == ("flow_sde", 0.7, 0)
    assert (c.train.learning_rate, c.algorithm.options.clip_range) == (3e-4, 1e-4)
    # Upstream steps its EMA after each micro-batch, 2 for an update on its 32 devices, but only
    # while (updates + 1) % 8 == 0: a factor of 0.9 twice every 8 updates.
    assert c.train.ema_decay == pytest.approx((0.9**2) ** (1 / 8), abs=1e-3)
    assert (c.algorithm.options.kl_beta, c.algorithm.options.kl_weighting) == (beta, "no_dt")
    assert list(c.reward.weights.items()) == [(name, 1.0)]


@pytest.mark.parametrize("name", RECIPES)
def test_fast_is_upstreams_fast_without_guidance(name):
    """`geneval_sd3_fast_nocfg`: CPS 0.8 on 3 of the first 5 steps."""
    c = load(name, "fast")
    assert (c.sample.kernel, c.sample.noise_level) == ("cps", 0.8)
    assert (c.sample.window, tuple(c.sample.window_range)) == (3, (0, 5))
    assert c.sample.guidance_scale == c.eval.guidance_scale == 1
    assert (c.algorithm.options.clip_range, c.algorithm.options.kl_beta) == (1e-5, 0)


@pytest.mark.parametrize("variant, groups, steps", [("nft", 48, 10), ("awm", 72, 14)])
@pytest.mark.parametrize("name", RECIPES)
def test_another_algorithm_is_sound_on_every_device_count(name, variant, groups, steps):
    """Of the published scripts: images and steps of an epoch, a rollout without guidance, and
    advantages over the standard deviation of an epoch."""
    if (name, variant) == ("pickscore", "awm"):
        groups = 24
    config = load(name, variant)
    settings.check(config)
    assert (config.name, config.algorithm.name) == (f"{name}-{variant}", variant)
    for devices in (1, 2, 4, 8, 16, 32, 64):
        plan = batch_plan.make_plan(config, devices)
        assert (plan.groups, plan.group_size) == (groups, 24)
        assert plan.updates == (2 if (name, variant) == ("ocr", "nft") else 1)
    assert (config.sample.steps, config.sample.guidance_scale) == (steps, 1)
    assert (config.eval.guidance_scale, config.advantage.name) == (1, "global")
    assert config.train.learning_rate == 3e-4
    assert config.train.ema_decay == {"nft": 0.9, "awm": 0.99}[variant]


def test_options_that_differ_by_task():
    options = [load(name, "awm").algorithm.options for name in RECIPES]
    assert [(o.kl_beta, o.first) for o in options] == [(3e-3, 1), (3e-3, 1), (1e-4, 0)]
    slow, other = load("ocr", "nft").algorithm.options, load("geneval", "nft").algorithm.options
    assert (slow.beta, slow.old_flat, slow.old_rate, slow.old_most) == (0.1, 75, 0.0075, 0.999)
    assert (other.beta, other.old_flat, other.old_rate, other.old_most) == (1, 0, 1e-3, 0.5)


@pytest.mark.parametrize("name, variant", EACH)
def test_a_variant_changes_only_a_few_lines(name, variant):
    flat = [dict(flatten(load(name, v).to_dict())) for v in ("full", variant)]
    changed = {k for k in flat[0] if flat[0][k] != flat[1][k]}
    fast = {"name", "algorithm.options.clip_range", "algorithm.options.kl_beta"}
    fast |= {"sample.guidance_scale", "eval.guidance_scale"}
    fast |= {f"sample.{k}" for k in ("kernel", "noise_level", "window", "window_range")}
    small = {"eval.images", "eval.every"}
    assert changed == {"full": set(), "fast": fast, "single_gpu": fast | small}[variant]


def flatten(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_an_unknown_variant():
    expected = "geneval:quick: choose a variant from full, fast, single_gpu, nft, awm"
    with pytest.raises(ValueError, match=expected):
        load("geneval", "quick")


def parsed(name, changes):
    """A recipe as the command line reads it: {"reward.threads": 2} is --config.reward.threads=2."""
    arguments = ["train", f"--config={ROOT}/configs/{name}"]
    arguments += [f"--config.{knob}={value}" for knob, value in changes.items()]
    values = flags.FlagValues()
    settings = {"flag_values": values, "sys_argv": arguments}
    holder = config_flags.DEFINE_config_file("config", None, "", **settings)
    values(arguments)
    return holder.value


def test_a_variant_is_chosen_on_the_command_line():
    changed = {"reward.options.geneval.detector": "small"}
    expected = load("geneval", "fast")
    expected.reward.options.geneval.detector = "small"
    assert parsed("geneval.py:fast", changed).to_dict() == expected.to_dict()


def options_of(name):
    """{option: default} of a reward, by its code."""
    module, _, function = rewards.TABLE[name].partition(":")
    make = getattr(importlib.import_module(module), function.removesuffix("()"))
    make = geneval.make if make is geneval.graded else make
    return {k: p.default for k, p in inspect.signature(make).parameters.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_it_lists_every_option_of_its_rewards(name):
    """The command line can set nothing else. Rows that share a reward's options need none."""
    config = load(name)
    used = {*config.reward.weights, *config.eval.rewards} - set(rewards.VIEWS)
    assert config.reward.options.to_dict() == {reward: options_of(reward) for reward in used}


@pytest.mark.parametrize("name", RECIPES)
def test_what_an_error_says_to_set_can_be_set(name):
    files = [
        f for part in ("rewards", "detection") for f in (ROOT / "flowgrpo_jax" / part).iterdir()
    ]
    sources = "".join(f.read_text() for f in files if f.suffix == ".py")
    said = set(re.findall(r"reward\.options\.([a-z]\w*)\.([a-z]\w*)", sources))
    listed = load(name).reward.options
    changes = {f"reward.options.{r}.{option}": "/x" for r, option in said if r in listed}
    assert len(changes) >= {"geneval": 4, "ocr": 0, "pickscore": 9}[name]
    changed = dict(flatten(parsed(f"{name}.py", changes).to_dict()))
    assert {knob: changed[knob] for knob in changes} == changes


def test_fewer_monitors_can_be_chosen_on_the_command_line():
    settings.check(parsed("pickscore.py", {"eval.rewards": "('pickscore',)"}))


def test_extras_that_are_named_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    files = [
        *ROOT.glob("configs/*.py"),
        *ROOT.glob("flowgrpo_jax/**/*.py"),
        *ROOT.glob("docs/*.md"),
    ]
    named = {
        f.relative_to(ROOT): re.findall(r"'(?:flowgrpo_jax|\.)\[([\w,]+)\]'", f.read_text())
        for f in files
    }
    extras = {extra for found in named.values() for one in found for extra in one.split(",")}
    assert extras <= set(setup["options.extras_require"])
    detector = named[Path("configs/geneval.py")]
    assert detector[0] == "torch" and "torch" in setup["options.extras_require"]["torch"]


@pytest.mark.parametrize("name", RECIPES)
def test_its_rewards_are_rows_of_the_table(name):
    config = load(name)
    absent = {*config.reward.weights, *config.eval.rewards} - set(rewards.TABLE)
    assert not absent


@pytest.mark.parametrize("name", ["geneval", "ocr"])
def test_its_prompts_are_many_and_apart(name):
    train_prompts, test_prompts = parts.load_prompts(load(name), training=True)
    apart = {r["prompt"] for r in train_prompts}.isdisjoint(r["prompt"] for r in test_prompts)
    assert apart and len(train_prompts) >= 20_000 and len(test_prompts) >= 500
