"""Runs of seconds on a tiny model, in this process or as commands of their own."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from flowgrpo_jax.storage import logs

ROOT = Path(__file__).parent.parent
RECIPE = """
from pathlib import Path

from flowgrpo_jax.configs import shapes
from ml_collections import ConfigDict

def get_config():
    c = shapes.get_config()
    c.model.path = str(Path(__file__).parent / "model")
    c.model.height = c.model.width = 32
    c.epochs = 4
    c.lora.rank, c.lora.alpha = 2, 4.0
    c.model.product_dtype = ""  # the same on every CPU
    c.cpu_devices = 1  # commands are compared bit for bit with runs in this process
    c.sample.groups, c.sample.group_size, c.sample.micro_batch = 2, 4, 2
    c.sample.steps, c.sample.window, c.sample.window_range = 4, 2, (0, 3)
    c.train.updates_per_epoch = 2
    c.reward.weights = ConfigDict({"jpeg_incompressibility": 20.0, "shapes": 0.0})
    c.eval.every, c.eval.images, c.eval.micro_batch, c.eval.steps = 2, 12, 4, 2
    c.eval.rewards = ("jpeg_incompressibility", "shapes_strict")
    c.checkpoint.best = "jpeg_incompressibility"
    c.checkpoint.every = 1
    c.monitor.move = False  # one program less to compile
    return c
"""


def load(folder, **changes):
    config = runpy.run_path(str(folder / "tiny.py"))["get_config"]()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def start(folder, module, *arguments):
    """An entry point as a process of its own, from the command line."""
    return subprocess.Popen(
        [sys.executable, "-m", f"flowgrpo_jax.{module}", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(folder, module, *arguments):
    process = start(folder, module, *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def rows(workdir):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def timeless(row, prefix=""):
    """A row of metrics without what depends on the clock (and, with a prefix, without the figures
    that begin so; those of "eval/" are all of an evaluation's)."""
    clock = re.compile(
        r"seconds|\w+_per_second|share_of_peak|peak_memory_gb|hidden_rewards|eval_seconds"
    )
    left_out = logs.EVALUATED if prefix == "eval/" else (prefix or "\n",)
    return {k: v for k, v in row.items() if not clock.match(k) and not k.startswith(left_out)}


def same(ours, theirs):
    """Two training states, bit for bit."""

    def bits(x):
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), ours, theirs)
