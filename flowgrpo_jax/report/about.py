"""The page's last part names the recipe, settings that differ from it, versions and machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from etils import epath

from flowgrpo_jax.checkpoints.run_checkpoints import versions
from flowgrpo_jax.command_line import knobs, recipe_files
from flowgrpo_jax.report.pictures import FOLDER
from flowgrpo_jax.storage import files, logs

FILE = "about.json"


def save(workdir: epath.Path, config: Mapping[str, Any]) -> None:
    """Write what the run of a resolved config is to the work directory; an error is a warning."""
    if jax.process_index() > 0:
        return
    with logs.warn_on_error("what the run's page says about the run"):
        (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
        recipe = recipe_files.on_command_line(sys.argv)
        about = {
            "recipe": recipe or "",
            "changed": changed(config, recipe),
            "versions": versions(),
            "machine": machine(),
            "commit": commit(),
            "started": time.time(),
        }
        files.replace(workdir / FOLDER / FILE, json.dumps(logs.plain(about), indent=1))


def changed(config: Mapping[str, Any], recipe: str | None) -> dict[str, list[str]]:
    """{knob: [the recipe's value, the run's]} where they differ, as Python writes the values.

    Without a recipe they are compared with the base of all recipes.
    """
    default = knobs.load(recipe)
    found = {}
    for knob, value in knobs.flat(config).items():
        before = default.get(knob)
        if json.dumps(before, default=str) != json.dumps(value, default=str):
            found[knob] = [repr(before), repr(value)]
    return found


def machine() -> dict[str, Any]:
    """Return the devices and the host that the run is on."""
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 0,
    }


def commit() -> str:
    """Return the commit of the checkout that this package lies in; "" where it is installed."""
    folder = Path(__file__).parent.parent.parent
    if not (folder / ".git").exists():
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return ""
