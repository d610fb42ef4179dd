"""The paper's recipes and their variants: sound on every device count, and run end to end.

A run is of the real recipe and its real prompts on a tiny random model of SD3.5's layout. A reward
that cannot run here gives its place to JPEG compressibility.
"""

import configparser
import importlib
import inspect
import json
import math
import re
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from flowgrpo_jax import rewards
from flowgrpo_jax.assembly import batch_plan, parts, settings
from flowgrpo_jax.rewards import geneval
from flowgrpo_jax.train import train

ROOT = Path(__file__).parent.parent
RECIPES = ("geneval", "ocr", "pickscore")
VARIANTS = ("full", "fast", "single_gpu")  # those of GRPO
EACH = [(name, variant) for name in RECIPES for variant in VARIANTS]


def load(name, *variant):
    return importlib.import_module(f"flowgrpo_jax.configs.{name}").get_config(*variant)


# ------------------------------------------------------------------------------- soundness


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
    """Of the published scripts: images and steps of an epoch, and a rollout without guidance."""
    config = load(name, variant)
    settings.check(config)
    assert (config.name, config.algorithm.name) == (f"{name}-{variant}", variant)
    for devices in (1, 2, 4, 8, 16, 32, 64):
        plan = batch_plan.make_plan(config, devices)
        assert (plan.groups, plan.group_size) == (groups, 24)
        assert plan.updates == (2 if (name, variant) == ("ocr", "nft") else 1)
    assert (config.sample.steps, config.sample.guidance_scale) == (steps, 1)
    assert config.eval.guidance_scale == 1
    assert config.train.learning_rate == 3e-4


def test_options_that_differ_by_task():
    betas = [load(name, "awm").algorithm.options.kl_beta for name in RECIPES]
    assert betas == [1e-3, 3e-3, 1e-4]
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


# ------------------------------------------------------------------------------ end to end


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
