"""The commands by which a user goes on from a run, as the page prints them to be pasted."""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Mapping
from typing import Any

NO_RECIPE = "RECIPE"  # stands for the recipe of a run that was started from Python
LORA = "lora"  # the folder that the printed commands export to


def lines(workdir: str, config: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """Return lines of shell: comments, and the commands that they explain.

    Args:
      config: the resolved one of the run; about: its recipe and what differs from it (about.py).
    """
    recipe, epochs = about.get("recipe", ""), config.get("epochs", 0)
    given = ["--config", recipe or NO_RECIPE]
    if recipe:
        given += settings(about.get("changed", {}))
    found = [] if recipe else [f"# {NO_RECIPE}: a file whose get_config() has this run's settings"]
    found += [
        f"# go on from the last checkpoint (raise epochs to go beyond {epochs})",
        command("train", *given, "--workdir", workdir, "--resume"),
        "# see it while it runs",
        command("report", "--workdir", workdir, "--serve"),
        "# measure it",
        command("evaluate", *given, "--checkpoint", workdir, "--out", "evaluation.json"),
        "# write its weights for other programs",
        command("export", "--workdir", workdir, "--out", LORA),
    ]
    if config.get("lora", {}).get("rank") and "model" in config:
        drawn = drawing(config, about.get("changed", {}))
        found += ["# draw with them", command("generate", *drawn, "--prompt", "a text to draw")]
    return found


def command(module: str, *arguments: str) -> str:
    return shlex.join(["python", "-m", f"flowgrpo_jax.{module}", *arguments])


def settings(changed: Mapping[str, list[str]]) -> list[str]:
    """Return flags for {knob: [the recipe's value, the run's]}, values as Python writes them."""
    return [f"--config.{knob}={plain(now)}" for knob, (_, now) in changed.items() if knob != "name"]


def plain(value: str) -> str:
    """Return a value as a flag takes it: a text without its quotes, anything else as it is."""
    try:
        text = ast.literal_eval(value)
    except (ValueError, SyntaxError):  # such as inf
        return value
    return text if isinstance(text, str) else value


def drawing(config: Mapping[str, Any], changed: Mapping[str, list[str]]) -> list[str]:
    """Return the flags of `generate` that draw with the exported LoRA as the evaluation does."""
    model, evaluation = config["model"], config["eval"]
    flags = ["--model", model["path"], "--lora", LORA, f"--steps={evaluation['steps']}"]
    flags += [f"--guidance={evaluation['guidance_scale']}", f"--dtype={model['dtype']}"]
    flags += [f"--height={model['height']}", f"--width={model['width']}"]
    for name, value in model["options"].items():
        if f"model.options.{name}" in changed:
            flags.append(f"--option={name}={json.dumps(value)}")
    return flags
