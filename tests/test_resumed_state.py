"""Runs that are stopped within an epoch go on bit for bit, whatever state they have."""

import signal

import pytest
from ml_collections import ConfigDict
from short_runs import load, rows, same, timeless

from flowgrpo_jax import train as training

EPOCHS, STOPPED = 4, 3  # the last epoch is begun, stopped and begun again
CASES = {
    # Reset after the second epoch, so that it is neither the base nor the policy of the checkpoint.
    "reference": {
        "algorithm.options.kl_beta": 1.0,
        "algorithm.options.reset_every": 2,
    },
    "clip_of_vgrpo": {
        "algorithm": {"name": "vgrpo", "options": {"levels": 2, "clip_range": 0.01}},
        "train.updates_per_epoch": 2,
    },
    "adaptive_kl": {
        "algorithm.options.kl_beta": 1.0,
        "kl.name": "adaptive",
        "kl.options": {"target": 1e-3, "rate": 0.5, "limit": 0.5},
        "train.updates_per_epoch": 2,
    },
    "tasks_in_turn": {
        "prompts.train": "",
        "prompts.test": "",
        "prompts.tag_weights": {},
        "prompts.tasks": {
            "large": {"train": "shapes:train:position", "rewards": ("jpeg_incompressibility",)},
            "small": {"train": "shapes:train:counting", "rewards": ("jpeg_compressibility",)},
        },
        "prompts.alternate": True,
        "reward.weights": {"jpeg_incompressibility": 20.0, "jpeg_compressibility": 20.0},
        "eval.rewards": (),
        "train.step_each_term": True,
        "advantage.name": "batch",
    },
}
COPIES = {"reference": {"reference"}, "clip_of_vgrpo": {"old"}}


def config_of(runs, case):
    c = load(runs, epochs=EPOCHS, eval__every=0, checkpoint__best="", checkpoint__every=100)
    c.sample.micro_batch, c.train.updates_per_epoch = 4, 1  # a whole group
    with c.unlocked():
        for knob, value in CASES[case].items():
            *sections, name = knob.split(".")
            section = c
            for part in sections:
                section = section[part]
            section[name] = ConfigDict(value) if isinstance(value, dict) else value
    return c


def stop_within(monkeypatch, epoch):
    """Ctrl-C at the beginning of this epoch."""
    whole_epoch = training.one_epoch

    def one_epoch(run, state, at, *others):
        if at == epoch:
            signal.raise_signal(signal.SIGINT)
        return whole_epoch(run, state, at, *others)

    monkeypatch.setattr(training, "one_epoch", one_epoch)


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_bit_for_bit(runs, tmp_path, monkeypatch, case):
    whole = training.train(config_of(runs, case), tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_within(patched, STOPPED)
        with pytest.raises(SystemExit):
            training.train(config_of(runs, case), tmp_path / "stopped")
    before = rows(tmp_path / "stopped")
    resumed = training.train(config_of(runs, case), tmp_path / "stopped", resume=True)
    same(resumed, whole)
    expected, found = rows(tmp_path / "whole"), rows(tmp_path / "stopped")
    assert len(before) == STOPPED and [*map(timeless, found)] == [*map(timeless, expected)]
    assert all(row["grad_norm"] > 0 and row["failed"] == row["broken"] == 0 for row in found)
    assert set(whole.copies) == {"ema"} | COPIES.get(case, set())
    the_state_mattered(case, *found[-2:], whole)


def the_state_mattered(case, before, last, whole):
    """Of the epoch before the stop and the one after it: a run without the state would differ."""
    if case == "reference":
        assert before["kl"] == 0 < last["kl"]  # its own reference, and one epoch old
    elif case == "clip_of_vgrpo":
        same(whole.copies["old"], whole.policy)  # it draws the next images
    elif case == "adaptive_kl":
        assert last["kl_factor"] != before["kl_factor"] != 1
    else:
        assert before["reward"] > 0 > last["reward"]
        assert int(whole.step) == 2 * EPOCHS  # a window of two steps
