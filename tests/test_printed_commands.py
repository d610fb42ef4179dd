"""The commands that the page of a run prints, as the programs themselves read them."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

from flowgrpo_jax.report import __main__ as command
from flowgrpo_jax.report import commands

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "epochs": 2,
    "lora": {"rank": 4},
    "eval": {"steps": 40, "guidance_scale": 4.5},
    "model": {
        "path": "my models/one",
        "dtype": "bfloat16",
        "height": 64,
        "width": 32,
        "options": {"t5": False, "t5_length": 0},
    },
}
PARSED = """
import runpy, sys
from absl import flags
from flowgrpo_jax.command_line import cli, usage
cli.run = lambda main: usage.parse(sys.argv)
runpy.run_module(sys.argv.pop(1), run_name="__main__")
for name in NAMES.split(","):
    value = flags.FLAGS
    for part in name.split("."):
        value = getattr(value, part)
    print(repr(value))
"""


def read_by(module, arguments, *names):
    """The values of flags as a command reads them from its command line."""
    program = [sys.executable, "-c", PARSED.replace("NAMES", repr(",".join(names)))]
    done = subprocess.run([*program, module, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [ast.literal_eval(line) for line in done.stdout.splitlines()]


def test_the_printed_commands_are_understood_by_the_commands():
    """Also a text with a quote, a tuple and a folder whose name has a space."""
    changed = {
        "name": ["'shapes'", "'mine'"],
        "eval.rewards": ["('shapes',)", "('shapes', 'shapes_strict')"],
        "model.path": ["'shapes'", "'my models/one'"],
        "prompts.test": ["'shapes:test'", '"it\'s.txt"'],
        "train.learning_rate": ["0.0015", "0.001"],
        "model.options.t5": ["True", "False"],
    }
    about = {"recipe": "shapes", "changed": changed}
    shown = commands.lines("runs/a b", SETTINGS, about)
    calls = [shlex.split(line) for line in shown if not line.startswith("#")]
    assert [call[:2] for call in calls] == [["python", "-m"]] * 5
    given = {call[2].rpartition(".")[2]: call[2:] for call in calls}
    knobs = ["config.eval.rewards", "config.prompts.test", "config.train.learning_rate"]
    values = [("shapes", "shapes_strict"), "it's.txt", 0.001]
    for name, flag in (("train", "workdir"), ("evaluate", "checkpoint")):
        module, *arguments = given[name]
        assert read_by(module, arguments, flag, *knobs) == ["runs/a b", *values]
    assert read_by(given["export"][0], given["export"][1:], "workdir", "out") == [
        "runs/a b",
        "lora",
    ]
    flags = ["model", "lora", "guidance", "dtype", "height", "width", "option"]
    assert read_by(given["generate"][0], given["generate"][1:], *flags) == [
        "my models/one",
        "lora",
        4.5,
        "bfloat16",
        64,
        32,
        ["t5=false"],
    ]
    assert command.parse(given["report"][1:]).workdir == "runs/a b"


def test_the_commands_of_a_run_from_python_say_what_to_put():
    shown = commands.lines("runs/a", SETTINGS, {"recipe": "", "changed": {"epochs": ["1", "2"]}})
    assert shown[0].startswith("# RECIPE: a file") and "--config RECIPE --workdir" in shown[2]
    full = commands.lines("runs/a", SETTINGS | {"lora": {"rank": 0}}, {"recipe": "shapes"})
    assert not any("generate" in line for line in full)  # it draws with an adapter
