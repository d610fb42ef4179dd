"""The driver of benchmarks/gpu.py: what a stage leaves, and what happens when one does not end."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks import epoch, gpu, machine


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
    monkeypatch.setattr(gpu, "stages", lambda args, out: listed)
    only = "good,bad,hung,after"
    args = arguments(monkeypatch, "--out", tmp_path, "--device", "cpu", "--only", only)
    assert gpu.drive(args) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]  # of few files all return
    found = json.loads((tmp_path / "results.json").read_text())
    results = {name: stage["result"] for name, stage in found["stages"].items()}
    assert results.pop("asked-not") == "not run"
    assert results == {
        "good": "done",
        "bad": "failed with 3",
        "hung": "ended after 3 s",
        "after": "done",
    }
    assert found["stages"]["after"]["log"] == "reached\n"
    assert found["machine"]["python"] and found["machine"]["jax"]
    time.sleep(0.2)
    left = subprocess.run(["pgrep", "-f", "sleep 98.7"], capture_output=True, text=True)
    assert left.stdout == ""


def test_no_stage_begins_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "stages", lambda args, out: [("late", python("print(1)"), 60)])
    args = arguments(monkeypatch, "--out", tmp_path, "--device", "cpu", "--minutes", 0.1)
    assert gpu.drive(args) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["stages"] == {"late": {"result": "not run"}}


def test_what_a_stage_has_found_is_there_before_it_ends(tmp_path, monkeypatch):
    """So that a machine that is taken away costs seconds."""
    code = """
import json, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(json.dumps({"so far": 1}))
print("begun", flush=True)
time.sleep(600)
"""

    def stages(args, out):
        return [("slow", [*python(code), str(out / "slow.json")], 600)]

    class Taken(Exception):
        pass

    def write(file, result):
        written(file, result)
        if json.loads(file.read_text())["stages"]["slow"]["figures"]:
            raise Taken

    written = gpu._write
    monkeypatch.setattr(gpu, "stages", stages)
    monkeypatch.setattr(gpu, "_write", write)
    with pytest.raises(Taken):
        gpu.drive(arguments(monkeypatch, "--out", tmp_path, "--device", "cpu"))
    (slow,) = json.loads((tmp_path / "results.json").read_text())["stages"].values()
    assert slow["result"] == "running" and slow["figures"] == {"so far": 1}
    assert slow["log"] == "begun\n"


def test_the_commands_of_all_stages_are_understood(tmp_path, monkeypatch):
    args = arguments(monkeypatch, "--out", tmp_path)
    listed = {name: command for name, command, _ in gpu.stages(args, tmp_path)}
    for name in ("epoch", "guided"):
        monkeypatch.setattr(sys, "argv", listed[name][2:])
        parsed = epoch.parse()
        assert (parsed.device, parsed.t5_length, parsed.rank, parsed.out) == (
            "gpu",
            128,
            32,
            tmp_path / f"{name}.json",
        )
        assert parsed.micro_batch == (8 if name == "epoch" else 4)
    monkeypatch.setattr(sys, "argv", listed["peak"][2:])
    assert gpu.parse().stage == "peak"
    assert "--config=shapes" in listed["shapes"]


def test_versions_and_hardware_without_git_and_without_a_driver(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = machine.described("gpu")
    assert found["gpu"] == "" and found["jax"]


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
