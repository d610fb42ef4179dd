"""What fails within a run, rewards, updates or the disk, ends it early or costs it little."""

import dataclasses
import re
import shutil
import subprocess
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from short_runs import load, rows, timeless

from flowgrpo_jax import algorithms, rewards
from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.train import one_epoch, train


def broken(images, prompts, metadata):
    raise RuntimeError("the server is down")


def test_a_reward_that_always_fails_ends_the_run(runs, monkeypatch):
    monkeypatch.setitem(rewards.TABLE, "shapes", f"{__name__}:broken")
    config = load(runs, eval__every=0)
    config.reward.weights.shapes = 1.0
    with pytest.raises(RuntimeError, match=r"failed on 100% .*reward\.max_failed=50%"):
        train(config, runs / "broken")


def test_what_was_trained_before_an_error_is_kept(runs, half, monkeypatch):
    """Whatever ends the run: the epochs since the last checkpoint are in a new one."""

    def fails_later(run, state, epoch, *rest):
        if epoch == 1:
            raise MemoryError("no room")
        return one_epoch(run, state, epoch, *rest)

    monkeypatch.setattr("flowgrpo_jax.train.one_epoch", fails_later)
    config = load(runs, eval__every=0, checkpoint__every=1000)
    with pytest.raises(MemoryError):
        train(config, runs / "cut-short")
    assert Checkpoints(runs / "cut-short" / "checkpoints").steps() == [1]
    (ours,) = rows(runs / "cut-short")
    assert timeless(ours) == timeless(rows(half)[0], prefix="eval/")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB: about five checkpoints of the tiny run, its pictures and its page."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(runs, leave):
    """A file that leaves so many bytes of the file system free."""
    with open(runs / "ballast", "wb") as file:
        file.write(bytes(shutil.disk_usage(runs).free - leave))


@pytest.mark.parametrize("leave", [0, 50_000])
def test_a_full_disk_costs_checkpoints_but_not_the_run(
    runs, whole, small_disk, monkeypatch, caplog, leave
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
    config = load(runs, epochs=3, eval__every=1, checkpoint__keep=1)
    train(config, workdir)
    assert "could not be written" in caplog.text and "No space left" in caplog.text
    assert Checkpoints(workdir / "checkpoints").steps() == [3]
    ours, theirs = rows(workdir), rows(whole.workdir)
    assert [row["epoch"] for row in ours] == [0, 1, 2, 3]
    for mine, other in zip(ours[:3], theirs):
        assert timeless(mine, prefix="eval/") == timeless(other, prefix="eval/")
    assert len(Checkpoints(workdir / "best").steps()) == 1


def test_the_last_state_finds_a_place_when_the_disk_is_full(runs, small_disk, monkeypatch):
    monkeypatch.setattr("flowgrpo_jax.checkpoints.run_checkpoints.tempfile.tempdir", str(runs))

    def disturbed(*arguments):
        fill(small_disk, leave=50_000)
        return one_epoch(*arguments)

    monkeypatch.setattr("flowgrpo_jax.train.one_epoch", disturbed)
    config = load(runs, epochs=1, eval__every=0, log__tensorboard=False)
    with pytest.raises(
        OSError, match=r"No space left.*state after epoch 1 is in .*--resume"
    ) as told:
        train(config, small_disk / "run")
    spare = Path(re.search(r"is in (\S+):", str(told.value))[1])
    assert Checkpoints(spare).steps() == [1]


def test_a_directory_that_cannot_be_written_is_an_early_error(runs, small_disk):
    """Before anything is loaded: not even the model's directory is looked for."""
    config = load(runs, model__path="/nowhere/sd3")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=r"nothing can be written to .*run: .*another --workdir"):
        train(config, small_disk / "run")


def hangs(images, prompts, metadata):
    time.sleep(10_000)


def test_a_reward_that_hangs_ends_the_run(runs, monkeypatch):
    monkeypatch.setitem(rewards.TABLE, "shapes", f"{__name__}:hangs")
    config = load(runs, eval__every=0, reward__timeout=0.5)
    config.reward.weights.shapes = 1.0
    with pytest.raises(RuntimeError, match=r"failed on 100% .*reward\.max_failed=50%"):
        train(config, runs / "hanging")


def never_finite():
    """An algorithm of the user's own, whose gradient is infinite."""
    grpo = algorithms.load("grpo", {})

    def loss(*args):
        value, figures = grpo.loss(*args)
        return jnp.inf * value, figures

    return dataclasses.replace(grpo, loss=loss)


def test_updates_that_are_never_finite_end_the_run(runs):
    config = load(runs, eval__every=0, train__max_skipped=1)
    config.algorithm = ConfigDict({"name": f"{__name__}:never_finite", "options": {}})
    with pytest.raises(RuntimeError, match=r"last 2 epochs .*train\.max_skipped=1"):
        train(config, runs / "infinite")


def test_a_run_does_not_start_before_its_rewards_are_ready(runs, monkeypatch):
    class Sleeping:
        def __call__(self, images, prompts, metadata):
            raise AssertionError("scored before it was ready")

        def ready(self):
            raise ConnectionError("no replica of the reward server answers")

    monkeypatch.setitem(rewards.TABLE, "host", f"{__name__}:sleeping")
    monkeypatch.setitem(globals(), "sleeping", Sleeping())
    config = load(runs, eval__every=0)
    config.reward.weights = ConfigDict({"host": 1.0})
    with pytest.raises(ConnectionError, match="no replica"):
        train(config, runs / "asleep")
