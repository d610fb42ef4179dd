"""Every program of a run is compiled once: nothing is compiled after the first epoch."""

from collections import Counter

import jax
import numpy as np
import processes
import tiny_model

from flowgrpo_jax import logs, rewards
from flowgrpo_jax.compilation_report import COMPILE
from flowgrpo_jax.train import train

PROGRAMS = ("draw_rollouts", "add_gradient", "apply_gradient", "draw_images")


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)) / 255, np.ones(len(images), bool)


def test_nothing_is_compiled_after_the_first_epoch_and_evaluation(tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.TABLE, "brightness", "test_recompilation:brightness")
    tiny_model.write_model(tmp_path / "model")
    config = processes.load(tmp_path, {"data": 1}, "overlap")
    config.epochs, config.eval.every, config.checkpoint.every = 3, 1, 10
    config.sample.micro_batch = 4  # several micro-batches to an update

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
        train(config, tmp_path / "run")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    first, *later = after[:3]
    assert later == [first, first], [epoch - first for epoch in later]
    assert [compiled[name] for name in PROGRAMS] == [1, 1, 1, 1]
