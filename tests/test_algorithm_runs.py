"""Runs of the algorithms other than GRPO: they train, and go on bit for bit after a stop."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from short_runs import load, rows, timeless

from flowgrpo_jax.train import train

CASES = {
    "nft": {"name": "nft", "options": {}},
    "awm": {"name": "awm", "options": {"levels": 2}},
    "awm_with_a_clip": {"name": "awm", "options": {"levels": 2, "clip_range": 0.1}},
    "dgpo": {"name": "dgpo", "options": {"levels": 2, "first_steps": 3}},
    "crd": {"name": "crd", "options": {"levels": 2}},
    "dpo": {"name": "dpo", "options": {"reset_every": 3}},
    "sft": {"name": "sft", "options": {}},
    "neighbor": {"name": "neighbor", "options": {"anchors": 2, "steps": 2, "clip_range": 0.2}},
}
COPIES = {
    "nft": {"old"},
    "awm": {"anchor"},
    "awm_with_a_clip": {"anchor", "old"},
    "dgpo": {"average", "drawer"},
    "crd": {"old", "drawer"},
    "dpo": {"reference"},
    "sft": set(),
    "neighbor": {"old"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_bit_for_bit(runs, tmp_path, case):
    """With copies of the policy, and with advantages that remember the prompts' rewards."""

    def config(epochs):
        c = load(runs, epochs=epochs, eval__every=0)
        c.algorithm = ConfigDict(CASES[case])
        c.sample.micro_batch = 4  # a whole group
        c.advantage = ConfigDict(
            {"name": "per_prompt", "clip": 5.0, "options": {"buffer_size": 8, "min_count": 2}}
        )
        return c

    whole = train(config(2), tmp_path / "whole")
    train(config(1), tmp_path / "halves")
    resumed = train(config(2), tmp_path / "halves", resume=True)
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "halves"), strict=True):
        assert timeless(a) == timeless(b)
        assert a["grad_norm"] > 0 and a["failed"] == a["skipped"] == a["broken"] == 0
    plain = [state.replace(key=0) for state in (whole, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *plain)
    assert np.isfinite(whole.memory["rewards"]).any()
    assert set(whole.copies) == {"ema"} | COPIES[case]


def test_a_run_of_mixgrpo_flash_goes_on_bit_for_bit(runs, tmp_path):
    """A window that moves, few steps after it, and DPM-Solver++ for them and for the evaluation.
    The update scores what was drawn: the ratio is 1 before the first step."""

    def config(epochs):
        c = load(runs, epochs=epochs, eval__solver="dpmpp_2m", sample__solver="dpmpp_2m")
        c.sample.steps, c.sample.window, c.sample.window_range = 7, 2, (0, 5)
        c.sample.window_schedule = "progressive"
        c.sample.window_options = ConfigDict({"every": 1, "stride": 2})
        c.sample.tail, c.sample.kernel = 0.6, "precise"
        return c

    whole = train(config(3), tmp_path / "whole")
    train(config(1), tmp_path / "halves")
    resumed = train(config(3), tmp_path / "halves", resume=True)
    drawn, again = (rows(tmp_path / name) for name in ("whole", "halves"))
    assert [row["window_start"] for row in drawn[:3]] == [0, 2, 0]
    for row in drawn[:3]:
        assert row["ratio_gap"] < 1e-5 and row["grad_norm"] > 0 and row["broken"] == 0
    # The run of one epoch ends with an evaluation, which the whole one makes before its next epoch.
    trained = [row for row in again if "grad_norm" in row]
    for a, b in zip(drawn[:3], trained, strict=True):
        assert timeless(a, prefix="eval/") == timeless(b, prefix="eval/")
    plain = [state.replace(key=0) for state in (whole, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *plain)


def test_tasks_take_turns_with_a_step_for_each_term(runs, tmp_path):
    """Pinterest's recipe in small: each epoch has one task's prompts and reward, and as many
    optimiser steps as terms. Only before the first of them is the policy the one that drew."""
    c = load(runs, epochs=2, eval__every=0, train__updates_per_epoch=1)
    c.sample.micro_batch = 8
    c.prompts.train = c.prompts.test = ""
    with c.prompts.unlocked():
        c.prompts.tag_weights = ConfigDict()
        c.prompts.tasks = ConfigDict(
            {
                "large": {"train": "shapes:train:position", "rewards": ("jpeg_incompressibility",)},
                "small": {"train": "shapes:train:counting", "rewards": ("jpeg_compressibility",)},
            }
        )
    c.reward.weights = ConfigDict({"jpeg_incompressibility": 20.0, "jpeg_compressibility": 20.0})
    c.checkpoint.best, c.eval.rewards = "", ()
    c.prompts.alternate = c.train.step_each_term = True
    c.advantage.name = "batch"
    state = train(c, tmp_path / "run")
    found = rows(tmp_path / "run")
    assert int(state.step) == 2 * 2  # a window of two steps
    assert [row["reward"] > 0 for row in found] == [True, False]
    for row in found:
        assert row["ratio_gap"] < 1e-5 and row["grad_norm"] > 0 and row["approx_kl"] > 0
