"""Every program of a run is compiled once: nothing is compiled after the first epoch."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import tiny_model

from flowgrpo_jax import rewards
from flowgrpo_jax.compilation.compilation_report import COMPILE
from flowgrpo_jax.storage import logs
from flowgrpo_jax.train import train

PROGRAMS = ("draw_rollouts", "add_gradient", "apply_gradient", "draw_images")


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)) / 255, np.ones(len(images), bool)


def test_nothing_is_compiled_after_the_first_epoch_and_evaluation(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, {"data": 1})
    config.epochs, config.eval.every, config.checkpoint.every = 3, 1, 10
    config.sample.micro_batch = 4  # several micro-batches to an update
    first, *later = compiled_by_epoch(config, tmp_path / "run", monkeypatch)[:3]
    assert later == [first, first], [epoch - first for epoch in later]
    assert [first[name] for name in PROGRAMS] == [1, 1, 1, 1]


def test_a_tree_on_two_devices_is_compiled_once(tmp_path):
    """In a process of its own, for this one has a single device."""
    code = "import jax; jax.config.update('jax_num_cpu_devices', 2); import test_recompilation;"
    code += f"test_recompilation.check_a_tree({str(tmp_path)!r})"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def check_a_tree(folder):
    """What a program returns is cut as the compiler likes: with branches in another way than what
    it was given."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = load(Path(folder), monkeypatch, {"data": 2})
        config.epochs, config.eval.every, config.train.updates_per_epoch = 2, 0, 1
        config.sample.groups, config.sample.group_size, config.sample.micro_batch = 4, 4, 16
        config.sample.steps, config.sample.window, config.sample.window_range = 3, 2, (0, 0)
        config.sample.branches, config.sample.splits = 4, (0, 1)
        config.advantage.name = "tree"
        first, second = compiled_by_epoch(config, Path(folder) / "run", monkeypatch)[:2]
    assert [second[name] - first[name] for name in PROGRAMS] == [0] * 4
    assert [first[name] for name in PROGRAMS] == [1, 1, 1, 0]


def load(tmp_path, monkeypatch, mesh):
    monkeypatch.setitem(rewards.TABLE, "brightness", "test_recompilation:brightness")
    tiny_model.write_model(tmp_path / "model")
    return processes.load(tmp_path, mesh, "overlap")


def compiled_by_epoch(config, workdir, monkeypatch):
    """Return how often each program has been compiled when each epoch ends."""
    jax.clear_caches()  # of programs that other tests have compiled in this process
    compiled: Counter = Counter()
    after = []  # the first epochs, each with its evaluation

    def listen(event, seconds, *, fun_name="", **_):
        if event == COMPILE:
            compiled[fun_name.removeprefix("jit(").removesuffix(")")] += 1

    def write(self, epoch, values):
        after.append(Counter(compiled))

    monkeypatch.setattr(logs.Metrics, "write", write)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(config, workdir)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return after
