"""Find the file of the recipe that `--config` names: the package's own, or one of the user's."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "configs"  # in a checkout a link to the folder at its top
FLAG = ("--config", "-config")


def names() -> list[str]:
    """The names of the package's recipes, without the two files that they share."""
    files = [f.relative_to(FOLDER) for f in FOLDER.rglob("*.py")]
    recipes = [f for f in files if f.stem not in ("__init__", "base", "variants")]
    return sorted(f.with_suffix("").as_posix() for f in recipes)


def find(recipe: str) -> str:
    """Return the path of a recipe's file, with the variant at its end if there is one.

    Args:
      recipe: a path or the name of one of the package's recipes, and perhaps a variant:
        "mine.py", "geneval", "geneval:fast". A file that exists wins over a name.

    Raises FileNotFoundError that says which recipe may be meant where there is neither, and
    ValueError for a variant of a recipe that has none.
    """
    given, colon, variant = recipe.partition(":")
    known = names()
    if Path(given).is_file():
        _check_variant(recipe, Path(given), variant)
        return recipe
    if given in known:
        _check_variant(recipe, FOLDER / f"{given}.py", variant)
        return f"{FOLDER / given}.py{colon}{variant}"
    name = given.rpartition("configs/")[2].removesuffix(".py")
    if name in known:
        raise FileNotFoundError(
            f"--config={recipe}: there is no file {given!r}; give the package's recipe by its name,"
            f" --config={name}{colon}{variant}"
        )
    last = {n.rpartition("/")[2]: n for n in known}
    near = difflib.get_close_matches(name.rpartition("/")[2], last, n=1)
    meant = f"did you mean --config={last[near[0]]}{colon}{variant}? The" if near else "the"
    raise FileNotFoundError(
        f"--config={recipe}: there is no file and no recipe {given!r}; {meant} package has"
        f" {', '.join(known)}; give a recipe of your own by the path of its file"
    )


def _check_variant(recipe: str, file: Path, variant: str) -> None:
    """Raise ValueError for a file without `get_config`, or for a variant of one that has none."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    found = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == "get_config"]
    imported = [n for n in body if isinstance(n, ast.ImportFrom | ast.Import | ast.Assign)]
    if found and variant and not (found[0].args.args or found[0].args.vararg):
        raise ValueError(
            f"--config={recipe}: this recipe has no variants; leave {':' + variant!r} out"
        )
    if not found and not any("get_config" in ast.dump(n) for n in imported):
        raise ValueError(f"--config={recipe}: the file has no function get_config()")


def on_command_line(arguments: Sequence[str]) -> str | None:
    """The value of `--config` on a command line, if it is given."""
    return next(iter(all_on_command_line(arguments)), None)


def all_on_command_line(arguments: Sequence[str]) -> list[str]:
    """Every value of `--config` on a command line; more than one is a mistake."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        flag, equals, value = argument.partition("=")
        if flag in FLAG:
            found.append(value if equals else following)
    return found


def located(arguments: Sequence[str]) -> list[str]:
    """A command line with the path of the recipe in place of its name. Raises as `find` does."""
    found = list(arguments)
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in FLAG and equals:
            found[i] = f"{flag}={find(value)}"
        elif flag in FLAG and i + 1 < len(found):
            found[i + 1] = find(found[i + 1])
    return found
