"""Signals and hanging rewards: a process saves, ends and says with which status."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from short_runs import ROOT, load, rows, start, timeless

from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.command_line import exit_status
from flowgrpo_jax.scoring import host
from flowgrpo_jax.storage import logs
from flowgrpo_jax.train import train


def test_sigterm_saves_and_stops(runs, whole):
    workdir = runs / "stopped"
    endless = ["--config.epochs=1000000", "--config.eval.every=0", "--config.checkpoint.every=1000"]
    process = start(runs, "train", "--config=tiny.py", f"--workdir={workdir}", *endless)
    while process.poll() is None and not logs.read(workdir / "metrics.jsonl"):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == exit_status.RESTART == 75, err
    done = len(rows(workdir))
    assert "SIGTERM: saving" in out and f"stopped after epoch {done}; go on with --resume" in out
    assert Checkpoints(workdir / "checkpoints").steps() == [done]

    more = load(runs, epochs=done + 1, eval__every=0)
    assert int(train(more, workdir, resume=True).step) == 2 * (done + 1)
    pairs = [*zip(rows(workdir), rows(whole.workdir)[:4])]
    assert len(pairs) >= 2
    for ours, theirs in pairs:
        assert timeless(ours) == timeless(theirs, prefix="eval/")


HANGING = """
import threading, concurrent.futures as futures, pathlib, runpy, sys
from flowgrpo_jax import rewards
from flowgrpo_jax.command_line import exit_status
from flowgrpo_jax.train import train

pool = futures.ThreadPoolExecutor(1)  # whose thread Python joins before it ends

def hangs(images, prompts, metadata):
    return pool.submit(threading.Event().wait).result()

sys.modules["hanging"] = sys.modules["__main__"]
rewards.TABLE["shapes"] = "hanging:hangs"
config = runpy.run_path("tiny.py")["get_config"]()
config.eval.every, config.reward.timeout, config.reward.weights.shapes = 0, 0.5, 1.0
with exit_status.ending():
    train(config, pathlib.Path("hung"))
"""


def test_a_process_ends_though_a_reward_hangs_in_its_own_threads(runs):
    done = subprocess.run(
        [sys.executable, "-c", HANGING],
        cwd=runs,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "failed on 100%" in done.stderr and "leaving without it" in done.stderr
    assert Checkpoints(runs / "hung" / "checkpoints").steps() == []  # nothing was trained


SLEEPING = """
import pathlib, runpy, sys, time
from flowgrpo_jax import rewards
from flowgrpo_jax.command_line import exit_status
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
with exit_status.ending(), exit_status.exit_for_restart():
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
def test_a_stop_saves_and_does_not_wait_for_a_reward(runs, number, limit, seconds, status):
    shutil.rmtree(runs / "slept", ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPING, str(limit), str(seconds)],
        cwd=runs,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and not (runs / "slept" / "asked").exists():
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == status, err
    assert f"{number.name}: saving and stopping" in out
    assert "leaving without it" in err or seconds < 100
    assert Checkpoints(runs / "slept" / "checkpoints").steps() == [1]
