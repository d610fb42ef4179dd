"""The benchmark runs, and its engines compute the same before they are timed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_small_epoch(tmp_path):
    """The command itself refuses engines whose velocity, gradient or images differ."""
    engines = ["jax"] + ["torch"] * bool(importlib.util.find_spec("peft"))
    sizes = ["--groups=2", "--group_size=2", "--micro_batch=4", "--steps=4", "--window=2"]
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.epoch", f"--engines={','.join(engines)}", *sizes,
         "--repeats=1", "--warmup=0", f"--out={out}"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert set(engines) <= set(found["medians"])
    for name in engines:
        assert 0 < found["medians"][name]["sample"] < found["medians"][name]["epoch"]
