"""The command line of a command: read its flags, list them for `--help`, name misspelt ones."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from flowgrpo_jax.command_line import knobs, recipe_files, user_errors

HELP = {"--help", "-help", "-h"}
KINDS = {"int": "INTEGER", "float": "NUMBER", "comma separated list of strings": "TEXT,TEXT"}
MISSING = "must have a value"  # what absl says of a flag that is required
ADDED = r"^<[^>]*>: |;\s+repeat this option.*"  # what absl adds to the help of a flag
WIDTH = 100


def parse(arguments: Sequence[str]) -> list[str]:
    """Read the command line into `flags.FLAGS`. Returns the program's name, which is what is left.

    With `--help` prints what a user may set, and exits. Raises ValueError that names the flag, and
    the one that was meant, for what cannot be understood, and FileNotFoundError for a recipe that
    does not exist. What the code of a recipe raises passes through.
    """
    if len(recipes := recipe_files.all_on_command_line(arguments)) > 1:
        raise ValueError(
            f"--config is given {len(recipes)} times ({', '.join(recipes)}): a run has one recipe;"
            " leave one out, or write a recipe of your own that builds on both"
        )
    located = recipe_files.located(arguments)
    if HELP & set(arguments):
        print(text(arguments))
        raise SystemExit(0)
    try:
        left = flags.FLAGS(located)
    except Exception as error:
        if explained := explain(error, arguments):
            raise ValueError(explained) from error
        raise
    if len(left) > 1:
        raise ValueError(
            f"{left[1]!r} belongs to no flag: put a text that has spaces between quotes, and give"
            " every value by its flag, a recipe as --config NAME"
        )
    return left


def explain(error: BaseException, arguments: Sequence[str]) -> str:
    """Return the message to a user about an error of the flags.

    It is empty if the mistake is not on the command line but in the code of a recipe.
    """
    root = error
    while root.__context__:
        root = root.__context__
    if isinstance(root, Exception) and user_errors.is_for_users(root):
        return user_errors.message(root)  # a recipe refuses its variant
    if "Traceback" in str(error):
        return ""
    recipe = recipe_files.on_command_line(arguments)
    known = knobs.load(recipe) if "config" in flags.FLAGS else {}
    for argument in arguments if recipe else ():
        flag = re.split(r"[=\[]", argument)[0]
        if flag.startswith("--config.") and not _has(known, flag.removeprefix("--config.")):
            return unknown(flag, known)
    if isinstance(error, flags.UnrecognizedFlagError):
        return unknown(f"--{error.flagname}", known)
    if not isinstance(error, flags.Error):
        return ""
    required = re.fullmatch(rf"flag --(\w+)=None: .*{MISSING}.*", str(error))
    return f"--{required[1]} is required; --help shows an example" if required else str(error)


def _has(known: Mapping[str, Any], name: str) -> bool:
    return any(knob == name or knob.startswith(f"{name}.") for knob in known)


def unknown(flag: str, known: Mapping[str, Any]) -> str:
    """Say that there is no such flag, and which flags and knobs may be meant."""
    name = flag.removeprefix("--").removeprefix("config.")
    meant: dict[str, list[str]] = {own.name: [f"--{own.name}"] for own in own_flags()}
    for knob in known:
        for tail in {knob, knob.rpartition(".")[2]}:
            meant.setdefault(tail, []).append(f"--config.{knob}")
    tail = name.rpartition(".")[2]  # the right name may be in the wrong section
    near = next(([n] for n in (name, tail) if n in meant), None)
    near = near or difflib.get_close_matches(name, meant, n=2, cutoff=0.7)
    hints = list(dict.fromkeys(full for n in near for full in meant[n]))
    hint = f"did you mean {' or '.join(hints)}?" if hints else "--help lists all that there are"
    return f"{flag} is unknown: {hint}"


def own_flags() -> list[flags.Flag]:
    """The flags of this command, without those that absl brings."""
    modules = flags.FLAGS.flags_by_module_dict()
    ours = [m for m in modules if m == sys.argv[0] or m.startswith("flowgrpo_jax")]
    return [f for m in ours for f in modules[m] if f.name.partition(".")[0] != "config"]


def text(arguments: Sequence[str]) -> str:
    """Return the text of `--help`: the command's purpose, its flags, and its recipe's knobs."""
    parts = [inspect.getdoc(sys.modules["__main__"]) or "", "", "Flags:"]
    if has_recipe := "config" in flags.FLAGS:
        recipes = f"A recipe: {', '.join(recipe_files.names())}, or a file with get_config()."
        parts += _entry("--config=NAME|FILE (required)", recipes)
    for flag in own_flags():
        parts += _entry(_form(flag), re.sub(ADDED, "", flag.help or ""))
    if has_recipe:
        recipe = recipe_files.on_command_line(arguments)
        said, shown = knobs.comments(), set()
        owner = recipe or "every recipe"
        parts += ["", f"Knobs of {owner}; --config.epochs=10 sets one of them:"]
        for name, value in knobs.load(recipe).items():
            sections = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
            for section in [s for s in sections if s in said and s not in shown]:
                parts += _entry(section, said[section])
                shown.add(section)
            parts += _entry(f"{name}={value!r}", said.get(name, ""))
    parts += ["", f"{user_errors.TRACEBACK}=1 in the environment shows where an error arose."]
    return "\n".join(parts)


def _form(flag: flags.Flag) -> str:
    """Return the spelling of a flag, with its default value."""
    kind = flag.flag_type()
    if kind == "bool":
        return f"--[no]{flag.name} ({'on' if flag.default else 'off'})"
    choices = getattr(flag.parser, "enum_values", None)
    value = "|".join(choices) if choices else KINDS.get(kind, "TEXT")
    required = any(MISSING in check.message for check in flag.validators)
    default = "required" if required else f"default {flag.default}"
    return f"--{flag.name}={value}" + ("" if default == "default None" else f" ({default})")


def _entry(head: str, said: str) -> list[str]:
    """A line of a list: what to write, and what it means beside it or, where it is long, below."""
    indent = " " * 36
    lines = textwrap.wrap(said, WIDTH, initial_indent=indent, subsequent_indent=indent)
    if lines and len(head) < len(indent) - 3:
        return [f"  {head}".ljust(len(indent)) + lines[0].lstrip(), *lines[1:]]
    return [f"  {head}", *lines]
