"""Verdicts on the figures of the monitors, in cases that are known."""

import json

import numpy as np
import pytest
from short_runs import ROOT

from flowgrpo_jax.monitors import verdicts

FIRST = {"monitor/edge_density": 0.1, "monitor/colour_entropy": 4.0, "monitor/brightness": 0.5}


def levels(first, now, weights=()):
    return {v.figure: v.level for v in verdicts.judge(first, now, dict(weights))}


def test_the_case_that_is_known_is_an_alarm():
    """Edge density fell by 60 %, colour entropy by 54 %, brightness by 73 %."""
    hacked = {
        "monitor/edge_density": 0.04,
        "monitor/colour_entropy": 1.84,
        "monitor/brightness": 0.135,
    }
    found = verdicts.judge(FIRST, hacked, {})
    assert [v.level for v in found] == ["alarm"] * 3 and verdicts.worst(found) == "alarm"
    assert found[0].says.startswith("fell by 60% (alarm from 35%): detail is lost")
    assert "Colour entropy fell by 54%" in verdicts.in_words(found)


def test_a_whole_honest_run_of_the_box_raises_no_alarm():
    """The 400 epochs of docs/results.md, and what has moved far is to be watched."""
    report = json.loads((ROOT / "benchmarks/results/shapes-400/monitors.json").read_text())
    found = {v.figure: v.level for v in verdicts.judge(*report["rows"], {"shapes": 1.0})}
    assert len(found) == 15
    assert {name for name, level in found.items() if level != "fine"} == {
        "move_high",
        "move_middle",
        "true_loss",
    }
    assert set(found.values()) == {"fine", "watch"}


@pytest.mark.parametrize(
    "trained, held_out, level",
    [
        (0.9, 0.2, "alarm"),  # 0.3 lower: six standard errors of the difference
        (0.9, 0.38, "watch"),
        (0.9, 0.5, "fine"),
        (0.5, 0.2, "alarm"),  # nothing was gained: no trick, but a run that gets worse
    ],
)
def test_a_held_out_reward_that_falls(trained, held_out, level):
    error = 0.05 / np.sqrt(2)  # so that a difference has 0.05
    errors = {"eval_error/own": error, "eval_error/other": error}
    first = {"eval/own": 0.5, "eval/other": 0.5} | errors
    now = {"eval/own": trained, "eval/other": held_out} | errors
    weights = {"own": 1.0, "other": 0.0}
    assert levels(first, now, weights) == {"eval/own": "fine", "eval/other": level}
    said = verdicts.judge(first, now, weights)[1].says
    assert ("a trick" in said, "does harm" in said) == (
        level != "fine" and trained > 0.5,
        level != "fine" and trained == 0.5,
    )


@pytest.mark.parametrize(
    "weight, now, level", [(1.0, 0.2, "alarm"), (1.0, 0.8, "fine"), (-1.0, 0.8, "alarm")]
)
def test_a_trained_reward_that_moves_against_its_weight(weight, now, level):
    """Reward-weighted regression with too large a step drew nothing in the end (docs/league.md)."""
    error = {"eval_error/own": 0.02}
    found = verdicts.judge({"eval/own": 0.5} | error, {"eval/own": now} | error, {"own": weight})
    assert [(v.label, v.level) for v in found] == [("Trained reward own", level)]


def test_a_reward_that_counts_faults_is_worse_when_it_rises():
    errors = {"eval_error/shapes": 0.01, "eval_error/shapes_unknown": 0.01}
    first = {"eval/shapes": 0.5, "eval/shapes_unknown": 0.1} | errors
    now = {"eval/shapes": 0.9, "eval/shapes_unknown": 0.4} | errors
    assert levels(first, now, {"shapes": 1.0}) == {
        "eval/shapes": "fine",
        "eval/shapes_unknown": "alarm",
    }


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_reward_that_no_picture_changes_is_no_gain(value):
    """It has no standard error: nothing or everything is right in both evaluations."""
    first = {"eval/own": value, "eval_error/own": 0.0, "eval/other": 0.5, "eval_error/other": 0.01}
    now = first | {"eval/other": 0.2}
    own, other = verdicts.judge(first, now, {"own": 1.0})
    assert own.level == "fine" and "a trick" not in other.says
    assert verdicts.gain("own", first, now) == (0.0, 0.0)


def test_every_evaluation_but_the_first_is_judged():
    rows = [
        {"epoch": 0, "eval/own": 0.5, **FIRST},
        {"epoch": 1, "reward": 0.5},
        {"epoch": 2, "eval/own": 0.5, **FIRST, "monitor/brightness": 0.7},
        {"epoch": 4, "eval/own": 0.5, **FIRST, "monitor/brightness": None},
    ]
    found = verdicts.verdicts(rows, {"own": 1.0})
    assert {epoch: verdicts.worst(v) for epoch, v in found.items()} == {2: "watch", 4: "fine"}
    assert [v.figure for v in found[4]] == ["edge_density", "colour_entropy"]


@pytest.mark.parametrize("change, level", [(4e-5, "fine"), (3e-4, "watch"), (2e-3, "watch")])
def test_log_probs_that_leave_the_clip_range_are_seen(change, level):
    """By the epoch before the evaluation, at the step that moved most."""
    rows = [
        {"epoch": 0, "eval/own": 0.5, "log_prob_change/03": 1.0},
        {"epoch": 1, "log_prob_change/03": 1e-6, "log_prob_change/11": change},
        {"epoch": 2, "eval/own": 0.5, "log_prob_change/03": 1.0},
    ]
    (found,) = verdicts.verdicts(rows, {"own": 1.0}, {"clip_range": 1e-4})[2]
    assert (found.figure, found.level) == ("log_prob_change/11", level)
    assert "at step 11" in found.says
    assert verdicts.verdicts(rows, {"own": 1.0}, {"clip_range": 0.0})[2] == []
    assert verdicts.verdicts(rows, {}, {"clip_range": 1e-4, "trust_region": "dppo"})[2] == []


def test_log_probs_that_are_not_finite_are_no_change():
    """The metrics have null for them, and a page cannot hold NaN."""
    for finite in ({}, {"log_prob_change/04": 2e-4}):
        found = verdicts.drift({"log_prob_change/03": None} | finite, {"clip_range": 1e-4})
        assert [(v.figure, v.now) for v in found] == list(finite.items())
