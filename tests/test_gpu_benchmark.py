"""The driver of benchmarks/gpu.py: what a stage leaves, and what happens when one does not end."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks import gpu


def arguments(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, options)])
    return gpu.parse()


def python(code):
    return [sys.executable, "-c", code]


def test_every_stage_is_recorded_however_it_ends(tmp_path, monkeypatch):
    """One that fails or hangs costs its own result, and its child does not live on."""
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '98.7']); time.sleep(600)"
    listed = [
        ("good", python("print('fine')"), 60),
        ("bad", python("raise SystemExit(3)"), 60),
        ("hung", python(child), 3),
        ("after", python("print('reached')"), 60),
        ("asked-not", python("print('never')"), 60),
    ]
    monkeypatch.setattr(gpu, "stages", lambda args: listed)
    only = "good,bad,hung,after"
    args = arguments(monkeypatch, "--out", tmp_path, "--device", "cpu", "--only", only)
    assert gpu.drive(args) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    results = {name: stage["result"] for name, stage in summary["stages"].items()}
    assert results.pop("asked-not") == "not run"
    assert results == {
        "good": "done",
        "bad": "failed with 3",
        "hung": "ended after 3 s",
        "after": "done",
    }
    assert (tmp_path / "after.log").read_text() == "reached\n"
    assert summary["machine"]["python"] and summary["machine"]["jax"]
    time.sleep(0.2)
    left = subprocess.run(["pgrep", "-f", "sleep 98.7"], capture_output=True, text=True)
    assert left.stdout == ""


def test_no_stage_begins_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "stages", lambda args: [("late", python("print(1)"), 60)])
    args = arguments(monkeypatch, "--out", tmp_path, "--device", "cpu", "--minutes", 0.1)
    assert gpu.drive(args) == 0
    assert not (tmp_path / "late.log").exists()


@pytest.mark.parametrize("stage", ["peak", "attention"])
def test_a_stage_by_itself(tmp_path, monkeypatch, stage):
    """On the CPU, small: products have a speed, and bfloat16 is close to float32."""
    if stage == "peak":
        pytest.importorskip("torch")
    file = tmp_path / "result.json"
    options = ("--device", "cpu", "--side", 64, "--tokens", 70, "--stage", stage, "--out", file)
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, options)])
    assert gpu.main() == 0
    result = json.loads(file.read_text())
    if stage == "peak":
        assert set(result) == {"jax", "torch"} and min(result.values()) > 0
    else:
        assert set(result) == {"xla"}
        assert 0 < result["xla"]["value"] < 0.02 and 0 < result["xla"]["gradient"] < 0.02
