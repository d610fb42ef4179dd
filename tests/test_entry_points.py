"""Training, evaluation, export and generation as a user runs them, on the model in the box.

Runs here are tiny: what is tested is that they are complete, repeatable and can be gone on with.
"""

import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from flowgrpo_jax import algorithms, checkpoint, cli, logs, policies, recipe, rewards, sharding
from flowgrpo_jax.checkpoint import Checkpoints
from flowgrpo_jax.evaluate import evaluate
from flowgrpo_jax.export import export
from flowgrpo_jax.generate import generate, t5_limit
from flowgrpo_jax.models import directories, sd3
from flowgrpo_jax.models.base_model import BaseModel
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.scoring import graph, host
from flowgrpo_jax.scoring.mix import Mix
from flowgrpo_jax.train import evaluate_into, first_state, one_epoch, train
from flowgrpo_jax.types import GraphReward, Pictures
from flowgrpo_jax.worlds.shapes import grammar

ROOT = Path(__file__).parent.parent
RECIPE = """
from configs import shapes
from ml_collections import ConfigDict

def get_config():
    c = shapes.get_config()
    c.epochs = 4
    c.lora.rank, c.lora.alpha = 2, 4.0
    c.cpu_devices = 1  # commands are compared bit for bit with runs in this process
    c.sample.groups, c.sample.group_size, c.sample.micro_batch = 2, 4, 2
    c.sample.steps, c.sample.window, c.sample.window_range = 4, 2, (0, 3)
    c.train.updates_per_epoch = 2
    c.reward.weights = ConfigDict({"jpeg_incompressibility": 20.0, "shapes": 0.0})
    c.eval.every, c.eval.images, c.eval.micro_batch, c.eval.steps = 2, 12, 4, 2
    c.eval.rewards = ("jpeg_incompressibility", "shapes_strict")
    c.checkpoint.best = "jpeg_incompressibility"
    c.checkpoint.every = 1
    return c
"""


def load(folder, **changes):
    config = runpy.run_path(str(folder / "tiny.py"))["get_config"]()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def start(folder, module, *arguments):
    """An entry point as a process of its own, from the command line."""
    return subprocess.Popen(
        [sys.executable, "-m", f"flowgrpo_jax.{module}", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(folder, module, *arguments):
    process = start(folder, module, *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs are."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.py").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def half(folder):
    """The work directory of two epochs from the command line."""
    call(folder, "train", "--config=tiny.py", "--config.epochs=2", "--workdir=half")
    return folder / "half"


@pytest.fixture(scope="module")
def whole(folder):
    """The work directory of four epochs, and the state that they end in."""
    workdir = folder / "whole"
    state = train(load(folder, log__tensorboard=False), workdir)
    assert (workdir / "checkpoints").is_dir()
    return SimpleNamespace(workdir=workdir, state=state)


def rows(workdir):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def timeless(row, prefix=""):
    """A row of metrics without what depends on the clock (and without evaluations)."""
    clock = ("seconds", "images_per_second")
    return {k: v for k, v in row.items() if k not in clock and not k.startswith(prefix or "\n")}


def same(ours, theirs):
    """Two training states, bit for bit."""

    def bits(x):
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), ours, theirs)


# --------------------------------------------------------------------------------- training


def test_a_run_leaves_everything_behind(folder, half):
    expected = load(folder, epochs=2).to_dict()
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


def test_every_figure_and_file_of_a_run_is_explained(half):
    explained = re.findall(r"`([^`]+)`", (ROOT / "docs" / "running.md").read_text())
    figures = {key.split("/")[0] for row in rows(half) for key in row} - {"epoch"}
    figures |= {name for row in algorithms.TABLE for name in algorithms.load(row, {}).figures}
    written = {f.name + "/" * f.is_dir() for f in half.iterdir()}
    assert {"reward", "eval", "grad_norm"} < figures and "metrics.jsonl" in written
    named = {name.split("/")[0] for name in explained}
    assert figures <= named and {name.removesuffix("/") for name in written} <= named


def test_prompts_that_were_encoded_ahead_need_no_encoder(folder, half, monkeypatch):
    """And train as those that are encoded on the way, but for rounding: other batches of texts."""
    texts = folder / "texts"
    arguments = "--config=tiny.py", "--epochs=2", f"--config.model.text_cache={texts}"
    out = call(folder, "encode", *arguments)
    count = len(list(texts.iterdir()))
    assert f"{count} prompts are in {texts}" in out and 10 < count <= 1 + 4 + 12

    def load_weights(directory, *args, **kwargs):
        assert "text_encoder" not in directory.name, "an encoder was loaded"
        return real(directory, *args, **kwargs)

    real = sd3.convert.load
    monkeypatch.setattr(sd3.convert, "load", load_weights)
    train(load(folder, epochs=2, model__text_cache=str(texts)), folder / "ahead")
    for ours, theirs in zip(rows(folder / "ahead"), rows(half), strict=True):
        assert timeless(ours) == pytest.approx(timeless(theirs), rel=1e-3, abs=1e-5)


def test_encoding_reads_the_encoders_alone(folder, monkeypatch):
    """It is for devices that are too small for all of the model at once."""
    real, read = sd3.convert.load, []

    def load_weights(directory, *args, **kwargs):
        read.append(directory.name)
        return real(directory, *args, **kwargs)

    monkeypatch.setattr(sd3.convert, "load", load_weights)
    model = recipe.load_model(load(folder), sharding.make_mesh(), texts_alone=True)
    assert read == [] and model.encode(["a circle"]).tokens.shape[0] == 1
    assert sorted(read) == ["text_encoder", "text_encoder_2", "text_encoder_3"]


def test_training_changes_the_policy(whole):
    state = whole.state
    assert int(state.step) == 8
    # The last block drops the text tokens' output, so their queries there have no effect.
    moved = [
        float(abs(v).max())
        for k, v in state.policy.items()
        if k.endswith("lora_b") and not k.endswith("5:6/attn/add_q_proj/lora_b")
    ]
    assert min(moved) > 0
    assert any((state.policy[k] != state.copies["ema"][k]).any() for k in state.policy)
    first, *_, last = rows(whole.workdir)
    assert first["eval/jpeg_incompressibility"] != last["eval/jpeg_incompressibility"]


def test_it_does_not_write_over_a_run(folder, half):
    before = rows(half)
    with pytest.raises(FileExistsError, match=r"half already holds a run: add --resume"):
        train(load(folder), half)
    assert rows(half) == before


def test_two_epochs_and_two_more_are_four(folder, half, whole):
    shutil.copytree(half, folder / "resumed")
    state = train(load(folder), folder / "resumed", resume=True)
    same(state, whole.state)
    assert [*map(timeless, rows(folder / "resumed"))] == [*map(timeless, rows(whole.workdir))]


def test_with_nothing_to_resume_it_starts(folder, half, caplog):
    """Launchers always say --resume; the first time there is nothing yet."""
    config = load(folder, epochs=1, eval__every=0)
    assert int(train(config, folder / "nothing", resume=True).step) == 2
    assert "nothing/checkpoints: starting from epoch 0" in caplog.text
    (ours,), theirs = rows(folder / "nothing"), rows(half)[0]
    assert timeless(ours) == timeless(theirs, prefix="eval/")


def test_a_resume_that_fails_leaves_the_record_alone(folder, half):
    workdir = folder / "wrong-rank"
    shutil.copytree(half, workdir)
    before = (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=r"none of the checkpoints .*lora\.rank"):
        train(load(folder, lora__rank=3), workdir, resume=True)
    assert (workdir / "config.json").read_text() == before


def test_sigterm_saves_and_stops(folder, whole):
    workdir = folder / "stopped"
    endless = ["--config.epochs=1000000", "--config.eval.every=0", "--config.checkpoint.every=1000"]
    process = start(folder, "train", "--config=tiny.py", f"--workdir={workdir}", *endless)
    while process.poll() is None and not logs.read(workdir / "metrics.jsonl"):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == cli.RESTART == 75, err
    done = len(rows(workdir))
    assert "SIGTERM: saving" in out and f"stopped after epoch {done}; go on with --resume" in out
    assert Checkpoints(workdir / "checkpoints").steps() == [done]

    more = load(folder, epochs=done + 1, eval__every=0)
    assert int(train(more, workdir, resume=True).step) == 2 * (done + 1)
    pairs = [*zip(rows(workdir), rows(whole.workdir)[:4])]
    assert len(pairs) >= 2
    for ours, theirs in pairs:
        assert timeless(ours) == timeless(theirs, prefix="eval/")


def damage(step, how):
    for file in step.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            file.write_bytes({"garbage": b"\xff" * len(content), "cut": content[:-9]}[how])


def test_a_resume_says_which_libraries_changed(folder, half, tmp_path, monkeypatch, caplog):
    shutil.copytree(half, tmp_path / "run")
    saved = Checkpoints(half / "checkpoints").record(2)["versions"]
    assert saved["jax"] == jax.__version__ and saved["numpy"] == np.__version__
    now = saved | {"jax": "0.0.1"}
    monkeypatch.setattr("flowgrpo_jax.checkpoint.versions", lambda: now)
    train(load(folder, epochs=2, eval__every=0), tmp_path / "run", resume=True)
    assert f"other libraries or devices (jax {jax.__version__} -> 0.0.1)" in caplog.text


@pytest.mark.parametrize("how", ["garbage", "cut"])
def test_a_damaged_checkpoint_is_passed_over(folder, whole, how, caplog):
    workdir = folder / how
    shutil.copytree(whole.workdir, workdir)
    damage(workdir / "checkpoints" / "4", how)
    state = train(load(folder), workdir, resume=True)
    assert f"{workdir}/checkpoints/4 cannot be read" in caplog.text
    same(state, whole.state)
    _, record = Checkpoints(workdir / "checkpoints").resume(state)
    assert record["epoch"] == 4  # it was written again

    for step in (workdir / "checkpoints").iterdir():
        damage(step, how)
    with pytest.raises(ValueError, match=r"none of the checkpoints \[1, 2, 3, 4\].*damaged"):
        train(load(folder), workdir, resume=True)


def test_callback_and_overlap_train_alike(folder, whole):
    config = load(folder, epochs=1, eval__every=0, reward__host_call="callback")
    train(config, folder / "callback")
    (ours,), theirs = rows(folder / "callback"), rows(whole.workdir)[0]
    assert timeless(ours) == pytest.approx(timeless(theirs, prefix="eval/"), rel=1e-4, abs=1e-6)


def broken(images, prompts, metadata):
    raise RuntimeError("the server is down")


def test_a_reward_that_always_fails_ends_the_run(folder, monkeypatch):
    monkeypatch.setitem(rewards.TABLE, "shapes", f"{__name__}:broken")
    config = load(folder, eval__every=0)
    config.reward.weights.shapes = 1.0
    with pytest.raises(RuntimeError, match=r"failed on 100% .*reward\.max_failed=50%"):
        train(config, folder / "broken")


def test_what_was_trained_before_an_error_is_kept(folder, half, monkeypatch):
    """Whatever ends the run: the epochs since the last checkpoint are in a new one."""

    def fails_later(run, state, epoch, *rest):
        if epoch == 1:
            raise MemoryError("no room")
        return one_epoch(run, state, epoch, *rest)

    monkeypatch.setattr("flowgrpo_jax.train.one_epoch", fails_later)
    config = load(folder, eval__every=0, checkpoint__every=1000)
    with pytest.raises(MemoryError):
        train(config, folder / "cut-short")
    assert Checkpoints(folder / "cut-short" / "checkpoints").steps() == [1]
    (ours,) = rows(folder / "cut-short")
    assert timeless(ours) == timeless(rows(half)[0], prefix="eval/")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, which is about five checkpoints of the tiny run."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(folder, leave):
    """A file that leaves so many bytes of the file system free."""
    with open(folder / "ballast", "wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - leave))


@pytest.mark.parametrize("leave", [0, 50_000])
def test_a_full_disk_costs_checkpoints_but_not_the_run(
    folder, whole, small_disk, monkeypatch, caplog, leave
):
    """Full in the second epoch, roomy again at the end of the third, whose checkpoint is there, as
    are all rows of the metrics: neither they nor pictures nor the best checkpoint end the run."""
    workdir = small_disk / "run"

    def disturbed(run, state, epoch, *rest):
        if epoch == 1:
            while not (workdir / "checkpoints" / "1").exists():  # written in the background
                time.sleep(0.05)
            fill(small_disk, leave)
        result = one_epoch(run, state, epoch, *rest)
        if epoch == 2:
            (small_disk / "ballast").unlink()
        return result

    monkeypatch.setattr("flowgrpo_jax.train.one_epoch", disturbed)
    config = load(folder, epochs=3, eval__every=1, checkpoint__keep=1)
    train(config, workdir)
    assert "could not be written" in caplog.text and "No space left" in caplog.text
    assert Checkpoints(workdir / "checkpoints").steps() == [3]
    ours, theirs = rows(workdir), rows(whole.workdir)
    assert [row["epoch"] for row in ours] == [0, 1, 2, 3]
    for mine, other in zip(ours[:3], theirs):
        assert timeless(mine, prefix="eval/") == timeless(other, prefix="eval/")
    assert len(Checkpoints(workdir / "best").steps()) == 1


def test_the_last_state_finds_a_place_when_the_disk_is_full(folder, small_disk, monkeypatch):
    monkeypatch.setattr("flowgrpo_jax.checkpoint.tempfile.tempdir", str(folder))

    def disturbed(*arguments):
        fill(small_disk, leave=50_000)
        return one_epoch(*arguments)

    monkeypatch.setattr("flowgrpo_jax.train.one_epoch", disturbed)
    config = load(folder, epochs=1, eval__every=0, log__tensorboard=False)
    with pytest.raises(
        OSError, match=r"No space left.*state after epoch 1 is in .*--resume"
    ) as told:
        train(config, small_disk / "run")
    spare = Path(re.search(r"is in (\S+):", str(told.value))[1])
    assert Checkpoints(spare).steps() == [1]


def test_a_directory_that_cannot_be_written_is_an_early_error(folder, small_disk):
    """Before anything is loaded: not even the model's directory is looked for."""
    config = load(folder, model__path="/nowhere/sd3")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=r"nothing can be written to .*run: .*another --workdir"):
        train(config, small_disk / "run")


def hangs(images, prompts, metadata):
    time.sleep(10_000)


def test_a_reward_that_hangs_ends_the_run(folder, monkeypatch):
    monkeypatch.setitem(rewards.TABLE, "shapes", f"{__name__}:hangs")
    config = load(folder, eval__every=0, reward__timeout=0.5)
    config.reward.weights.shapes = 1.0
    with pytest.raises(RuntimeError, match=r"failed on 100% .*reward\.max_failed=50%"):
        train(config, folder / "hanging")


def test_the_warning_comes_before_the_update(folder, monkeypatch):
    """Of the first update alone; in a recipe with two."""
    config = load(folder, epochs=1, eval__every=0)
    order, build = [], recipe.build

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

    monkeypatch.setattr(recipe, "build", watched)
    train(config, folder / "warned")
    assert order == ["warning", "update", "update"]


HANGING = """
import threading, concurrent.futures as futures, pathlib, runpy, sys
from flowgrpo_jax import cli, rewards
from flowgrpo_jax.train import train

pool = futures.ThreadPoolExecutor(1)  # whose thread Python joins before it ends

def hangs(images, prompts, metadata):
    return pool.submit(threading.Event().wait).result()

sys.modules["hanging"] = sys.modules["__main__"]
rewards.TABLE["shapes"] = "hanging:hangs"
config = runpy.run_path("tiny.py")["get_config"]()
config.eval.every, config.reward.timeout, config.reward.weights.shapes = 0, 0.5, 1.0
with cli.ending():
    train(config, pathlib.Path("hung"))
"""


def test_a_process_ends_though_a_reward_hangs_in_its_own_threads(folder):
    done = subprocess.run(
        [sys.executable, "-c", HANGING],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "failed on 100%" in done.stderr and "leaving without it" in done.stderr
    assert Checkpoints(folder / "hung" / "checkpoints").steps() == []  # nothing was trained


SLEEPING = """
import pathlib, runpy, sys, time
from flowgrpo_jax import cli, rewards
from flowgrpo_jax.train import train

limit, seconds, calls = float(sys.argv[1]), float(sys.argv[2]), []

def sleeps(images, prompts, metadata):
    calls.append(len(images))
    if sum(calls) > 8:  # from the second epoch on
        pathlib.Path("slept/asked").touch()
        time.sleep(seconds)
    return [0.0] * len(images), [True] * len(images)

sys.modules["sleeping"] = sys.modules["__main__"]
rewards.TABLE["shapes"] = "sleeping:sleeps"
config = runpy.run_path("tiny.py")["get_config"]()
config.eval.every, config.reward.timeout, config.reward.weights.shapes = 0, limit, 1.0
config.checkpoint.every = 100
with cli.ending(), cli.restarting():
    train(config, pathlib.Path("slept"))
"""


@pytest.mark.parametrize(
    "number, limit, seconds, status",
    [
        (signal.SIGTERM, 1800, 10_000, 75),
        (signal.SIGINT, 0, 10_000, 0),
        (signal.SIGTERM, 1800, host.GRACE * 1.5, 75),  # it returns while the process ends
    ],
)
def test_a_stop_saves_and_does_not_wait_for_a_reward(folder, number, limit, seconds, status):
    shutil.rmtree(folder / "slept", ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPING, str(limit), str(seconds)],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and not (folder / "slept" / "asked").exists():
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == status, err
    assert f"{number.name}: saving and stopping" in out
    assert "leaving without it" in err or seconds < 100
    assert Checkpoints(folder / "slept" / "checkpoints").steps() == [1]


def test_the_best_is_of_this_run(folder, whole, tmp_path):
    """A work directory with a best checkpoint alone is another run's all the same."""
    shutil.copytree(whole.workdir / "best", tmp_path / "run" / "best")
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(load(folder), tmp_path / "run")


@pytest.mark.parametrize(
    "best, other, offered", [(0.0, 0.0, [7]), (0.0, 1.0, [7]), (0.9, 0.0, []), (0.9, 1.0, [])]
)
def test_an_evaluation_whose_reward_failed_is_not_the_best(
    folder, tmp_path, monkeypatch, caplog, best, other, offered
):
    """That of `checkpoint.best` alone: a monitor that fails costs nothing but its own figure."""
    failures = {"jpeg_incompressibility": best, "shapes": other}
    result = {"metrics": {"shapes": 1.0}, "per_tag": {}, "failed": 1.0, "failures": failures}
    monkeypatch.setattr("flowgrpo_jax.train.evaluate", lambda *_, **__: (result, None, None))
    monkeypatch.setattr("flowgrpo_jax.train.save_grid", lambda *_: None)
    run, state = SimpleNamespace(config=load(folder)), SimpleNamespace(ema={})
    epochs: list[int] = []
    kept = SimpleNamespace(offer=lambda epoch, *_: epochs.append(epoch))
    evaluate_into(tmp_path, run, state, None, 7, kept, cli.Stop())
    assert epochs == offered
    assert ("jpeg_incompressibility failed on 90% and cannot be the best" in caplog.text) is (
        not offered
    )


@pytest.mark.parametrize("source", ["", "best"])
def test_weights_are_not_scaled_otherwise_than_they_were_trained(folder, whole, source):
    """Alpha is not in the weights: at another one they would load, and act too much or little."""
    alpha = load(folder).lora.alpha
    run = recipe.build(load(folder, lora__alpha=2 * alpha), training=False)
    wrong = rf"trained with lora\.alpha={alpha}, and the config has lora\.alpha={2 * alpha}: set"
    with pytest.raises(ValueError, match=wrong):
        policies.load(whole.workdir / source, run.model)


@pytest.mark.parametrize("change", [{"seed": 5}, {"lora__alpha": 1.5}])
def test_a_run_does_not_go_on_with_another(folder, whole, change):
    before = (whole.workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=r"was trained with .*set --config"):
        train(load(folder, epochs=5, **change), whole.workdir, resume=True)
    assert (whole.workdir / "config.json").read_text() == before


def test_the_best_evaluation_is_kept(folder, whole):
    """Of the evaluations after 0, 2 and 4 epochs, whatever the last checkpoints are."""
    scores = {r["epoch"]: r.get("eval/jpeg_incompressibility", -1) for r in rows(whole.workdir)}
    epoch = max(scores, key=scores.get)
    best = Checkpoints(whole.workdir / "best")
    assert best.steps() == [epoch]
    assert best.record(epoch)["eval/jpeg_incompressibility"] == scores[epoch]
    run = recipe.build(load(folder), training=False)
    result, *_ = evaluate(run, policies.load(whole.workdir / "best", run.model), run.encode([""]))
    assert result["metrics"]["jpeg_incompressibility"] == pytest.approx(scores[epoch], rel=1e-6)


def test_the_best_may_be_older_than_one_of_before(folder, tmp_path):
    """A run that goes on from an earlier checkpoint with another reward begins anew."""
    state = first_state(recipe.build(load(folder)))
    checkpoint.Best(tmp_path, "shapes", {}, BaseModel()).offer(4, state, {"eval/shapes": 0.75})
    strict = checkpoint.Best(tmp_path, "shapes_strict", {}, BaseModel())
    strict.offer(2, state, {"eval/shapes_strict": 0.25})
    assert Checkpoints(tmp_path).steps() == [2]
    again = checkpoint.Best(tmp_path, "shapes_strict", {}, BaseModel())
    assert again.value == 0.25
    again.offer(6, state, {"eval/shapes_strict": 0.25})  # not better
    assert Checkpoints(tmp_path).steps() == [2]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3), dtype=np.float32), np.ones(len(images), bool)


def brightness_in_graph(scale):
    return GraphReward(
        weights=np.float32(scale),
        prepare=lambda prompts, metadata: np.zeros(len(prompts)),
        score=lambda weights, images, _: weights * images.astype(np.float32).mean((1, 2, 3)),
    )


@pytest.mark.parametrize("combine", ["rewards", "advantages"])
def test_a_reward_trains_alike_on_the_host_and_in_the_graph(folder, monkeypatch, combine):
    monkeypatch.setitem(rewards.TABLE, "host", f"{__name__}:brightness")
    monkeypatch.setitem(rewards.TABLE, "graph", f"{__name__}:brightness_in_graph()")
    states = []
    for name in ("host", "graph"):
        config = load(folder, epochs=1, eval__every=0, reward__combine=combine)
        config.train.eps, config.train.learning_rate = 1.0, 1.0  # steps follow the gradient
        config.reward.weights = ConfigDict({name: 1.0, "jpeg_incompressibility": 5.0})
        config.reward.options = ConfigDict({"graph": {"scale": 1.0}} if name == "graph" else {})
        states.append(train(config, folder / f"in-{name}-{combine}"))
        (row,) = rows(folder / f"in-{name}-{combine}")
        assert 0 < row[f"reward/{name}"] < 255 and row["failed"] == 0
    assert any(np.abs(x).max() > 0 for k, x in states[0].policy.items() if "lora_b" in k)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * float(np.abs(b).max())),
        states[0].policy,
        states[1].policy,
    )


def never_finite():
    """An algorithm of the user's own, whose gradient is infinite."""
    grpo = algorithms.load("grpo", {})

    def loss(*args):
        value, figures = grpo.loss(*args)
        return jnp.inf * value, figures

    return dataclasses.replace(grpo, loss=loss)


def test_updates_that_are_never_finite_end_the_run(folder):
    config = load(folder, eval__every=0, train__max_skipped=1)
    config.algorithm = ConfigDict({"name": f"{__name__}:never_finite", "options": {}})
    with pytest.raises(RuntimeError, match=r"last 2 epochs .*train\.max_skipped=1"):
        train(config, folder / "infinite")


def test_a_run_does_not_start_before_its_rewards_are_ready(folder, monkeypatch):
    class Sleeping:
        def __call__(self, images, prompts, metadata):
            raise AssertionError("scored before it was ready")

        def ready(self):
            raise ConnectionError("no replica of the reward server answers")

    monkeypatch.setitem(rewards.TABLE, "host", f"{__name__}:sleeping")
    monkeypatch.setitem(globals(), "sleeping", Sleeping())
    config = load(folder, eval__every=0)
    config.reward.weights = ConfigDict({"host": 1.0})
    with pytest.raises(ConnectionError, match="no replica"):
        train(config, folder / "asleep")


# -------------------------------------------------------------------------------- evaluation


def test_evaluating_a_checkpoint_repeats_what_training_logged(folder, whole):
    out = call(
        folder, "evaluate", "--config=tiny.py", "--checkpoint=whole", "--out=results/rl.json"
    )
    result = json.loads((folder / "results" / "rl.json").read_text())
    logged = {k: v for k, v in rows(whole.workdir)[-1].items() if k.startswith("eval/")}
    flat = {f"eval/{name}": value for name, value in result["metrics"].items()}
    for tag, values in result["per_tag"].items():
        flat |= {f"eval/{tag}/{name}": value for name, value in values.items()}
    assert flat == pytest.approx(logged, rel=1e-6)
    assert set(result["metrics"]) == {"jpeg_incompressibility", "shapes_strict"}
    assert set(result["per_tag"]) == set(out.split()) & set(result["per_tag"])
    assert len(result["per_tag"]) == 6 and (result["images"], result["failed"]) == (12, 0)
    assert Image.open(folder / "results" / "rl.png").size[0] > 64


def test_the_base_is_the_policy_before_training(folder, whole):
    run = recipe.build(load(folder), training=False)
    base = policies.load("base", run.model)
    result, images, batch = evaluate(run, base, run.encode([""]))
    assert images.shape == (12, 64, 64, 3) and len(batch.prompts) == 12
    logged = rows(whole.workdir)[0]
    for name, value in result["metrics"].items():
        assert value == pytest.approx(logged[f"eval/{name}"], rel=1e-6)


def test_a_mean_is_over_the_images_whose_reward_did_not_fail():
    """Five images in micro-batches of two: the last one is padded, and the padding counts not."""
    records = [{"prompt": str(i), "tag": "even" if i % 2 == 0 else "odd"} for i in range(5)]

    def number(images, prompts, metadata):
        assert [int(p) for p in prompts] == images[:, 0, 0, 0].tolist()
        return images[:, 0, 0, 0], [p not in "03" for p in prompts]

    same = {  # in the graph: is the picture that of its prompt?
        "same": GraphReward(
            weights=(),
            prepare=lambda prompts, metadata: np.array([int(p) for p in prompts]),
            score=lambda weights, images, prompt: (images[:, 0, 0, 0] == prompt) * 1.0,
        )
    }
    run = SimpleNamespace(
        config=load_eval(images=5, micro_batch=2),
        mesh=sharding.make_mesh(),
        test_prompts=records,
        encode=lambda texts: np.array([int(t) for t in texts]),
        weights=None,
        empty=None,
        programs=SimpleNamespace(
            generate=lambda policy, weights, cond, empty, prompt, keys: Pictures(
                np.tile(cond[np.asarray(prompt)][:, None, None, None], (1, 8, 8, 3)).astype(
                    np.uint8
                ),
                np.ones(len(prompt), bool),
            )
        ),
        test_scorer=recipe.Scorer(
            Mix({"number": 1.0, "same": 0.0}),
            host.composite(
                {"number": number}, lambda ids: ([str(i) for i in ids], [records[i] for i in ids])
            ),
            same,
            graph.composite(same),
        ),
    )
    result, images, _ = evaluate(run, {})
    assert len(images) == 5
    assert result["metrics"] == {"number": pytest.approx((1 + 2 + 4) / 3), "same": 1.0}
    assert result["per_tag"] == {
        "even": {"number": 3.0, "same": 1.0},
        "odd": {"number": 1.0, "same": 1.0},
    }
    assert result["failed"] == pytest.approx(2 / 5)
    assert result["failures"] == {"number": pytest.approx(2 / 5), "same": 0.0}


def load_eval(**settings):
    return SimpleNamespace(eval=SimpleNamespace(seed=0, **settings))


# ---------------------------------------------------------------------- export and generation


def test_an_exported_lora_draws_what_the_checkpoint_draws(folder, whole):
    prompt = "a red circle"
    (record,) = (m for m in grammar.prompts("all") if m["prompt"] == prompt)
    (folder / "one.jsonl").write_text(json.dumps(record))
    changes = {"prompts__test": str(folder / "one.jsonl"), "eval__seed": 5}
    config = load(folder, eval__images=1, eval__micro_batch=1, eval__steps=3, **changes)
    run = recipe.build(config, training=False)
    ema = policies.load(whole.workdir, run.model)
    jax.tree.map(np.testing.assert_array_equal, ema, whole.state.copies["ema"])
    _, expected, _ = evaluate(run, ema, run.encode([""]))

    printed = call(folder, "export", "--workdir=whole", "--out=lora").split()
    assert len(printed) == 3 and all(Path(folder, file).is_file() for file in printed)
    for lora in ("lora", *printed):
        again = policies.load(folder / lora, run.model)
        jax.tree.map(np.testing.assert_array_equal, again, whole.state.copies["ema"])

    settings = ["--steps=3", "--guidance=1", "--seed=5", "--out=drawn/one.png"]
    call(folder, "generate", "--model=shapes", f"--prompt={prompt}", "--lora=lora", *settings)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "drawn" / "one.png")), expected[0])


def test_a_run_that_kept_no_best_says_so(whole, tmp_path):
    shutil.copytree(whole.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.raises(FileNotFoundError, match=r"no best checkpoint: train with checkpoint\.best"):
        export(tmp_path / "run", tmp_path / "lora", best=True)


def test_generating_with_the_base(folder, monkeypatch):
    model = sd3.load(
        "shapes", lora_spec=LoRASpec(2, 4.0), t5_length=t5_limit(directories.resolve("shapes"))
    )
    base = policies.load("base", model)
    two = ["a red circle", "three stars"]

    def draw(prompts, **settings):
        return generate(model, base, prompts, steps=2, guidance=2.0, **settings)

    images = draw(two)
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(draw(two), images)
    np.testing.assert_allclose(draw(two[:1])[0], images[0], atol=1)
    assert (draw(two, seed=1) != images).mean() > 0.1
    assert draw(two[:1], height=32, width=96).shape == (1, 32, 96, 3)
    # In parts of two, the last one filled up: a hundred prompts must not need the memory for all.
    three = draw([*two, "a star"])
    monkeypatch.setattr("flowgrpo_jax.settings.AT_ONCE", 2 * 64 * 64)
    np.testing.assert_allclose(draw([*two, "a star"]).astype(int), three.astype(int), atol=1)


@pytest.mark.parametrize(
    "source, problem, message",
    [
        ("runs/none", FileNotFoundError, "'runs/none' does not exist: give base, a work directory"),
        ("empty", FileNotFoundError, "no LoRA at .*empty"),
        ("whole/checkpoints/7", FileNotFoundError, r"no checkpoint 7 .*\[1, 2, 3, 4\]"),
    ],
)
def test_a_policy_that_is_not_there(folder, whole, source, problem, message, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir(exist_ok=True)
    model = SimpleNamespace(lora_shapes={k: v for k, v in whole.state.copies["ema"].items()})
    with pytest.raises(problem, match=message):
        policies.load(source, model)
