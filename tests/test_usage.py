"""How commands are called: flags, knobs, `--help`, and mistakes that end with one line."""

import re
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from flowgrpo_jax import prompts
from flowgrpo_jax.assembly import batch_plan, settings
from flowgrpo_jax.command_line import knobs, recipe_files, usage, user_errors

ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(monkeypatch):
    """A function that reads a command line as an entry point with a recipe does."""
    monkeypatch.chdir(ROOT)

    def read(*arguments):
        values = flags.FlagValues()
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        monkeypatch.setattr(flags, "FLAGS", values)
        config_flags.DEFINE_config_file("config", None, "A recipe.", flag_values=values)
        flags.mark_flag_as_required("config", flag_values=values)
        flags.DEFINE_bool("resume", False, "Go on.", flag_values=values, module_name="command")
        flags.DEFINE_integer(
            "step", None, "Epoch of it.", 0, flag_values=values, module_name="command"
        )
        usage.parse(sys.argv)
        return values

    return read


def test_a_command_line_is_read(command):
    values = command("--config=configs/geneval.py:fast", "--config.epochs=3", "--resume")
    assert (values.config.name, values.config.epochs, values.resume) == ("geneval-fast", 3, True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs=3"], r"--epochs is unknown: did you mean --config\.epochs\?$"),
        (["--epochs", "3"], r"--epochs is unknown: did you mean --config\.epochs\?$"),
        (["--sample.steps=3"], r"did you mean --config\.sample\.steps\?$"),
        (["--resum"], r"--resum is unknown: did you mean --resume\?$"),
        (["--config.resume"], r"did you mean --resume\?$"),
        (["--micro_batch=3"], r"--config\.eval\.micro_batch or --config\.sample\.micro_batch\?$"),
        (["--lerning_rate=3"], r"did you mean --config\.train\.learning_rate\?$"),
        (["--config.sample.group_sise=3"], r"did you mean --config\.sample\.group_size"),
        (["--config.smaple.groups=3"], r"did you mean --config\.sample\.groups\?$"),
        (["--config.eval.epochs=3"], r"did you mean --config\.epochs\?$"),
        (["--qqqq"], r"--qqqq is unknown: --help lists all"),
        (["--config.epochs=x"], r"--config\.epochs=x: .*'x'"),
        (["--step=-1"], r"--step=-1: .*non-negative"),
        (["--config=shapes"], r"--config is given 2 times .*a run has one recipe"),
        (["a red circle"], r"'a red circle' belongs to no flag: .*between quotes"),
    ],
)
def test_a_mistake_on_the_command_line_names_what_was_meant(command, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        command("--config", "configs/shapes.py", *arguments)
    assert user_errors.is_for_users(caught.value)


@pytest.fixture
def elsewhere(command, tmp_path, monkeypatch):
    """A function that reads a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return command


@pytest.mark.parametrize("name", ["geneval", "geneval:fast", "algorithms/nft", "signs"])
def test_a_recipe_by_its_name_is_the_one_by_its_file(command, monkeypatch, tmp_path, name):
    path, colon, variant = name.partition(":")
    by_file = command("--config", f"configs/{path}.py{colon}{variant}", "--config.epochs=3")
    monkeypatch.chdir(tmp_path)
    for arguments in (["--config", name], [f"--config={name}"], [f"-config={name}"]):
        by_name = command(*arguments, "--config.epochs=3")
        assert by_name.config.to_dict() == by_file.config.to_dict()


def test_a_name_is_no_other_argument(elsewhere):
    """A folder, a value or a knob that is called like a recipe stays what it is."""
    Path("shapes").mkdir()
    values = elsewhere("--config", "shapes", "--config.name=shapes", "--config.model.path=signs")
    assert (values.config.name, values.config.model.path) == ("shapes", "signs")
    assert values.config.prompts.train == "shapes:train"


def test_a_file_wins_over_a_recipe_of_its_name(elsewhere):
    code = "from flowgrpo_jax.configs import signs\n\nget_config = signs.get_config\n"
    Path("shapes").write_text(code)
    assert elsewhere("--config=shapes").config.name == "signs"


def test_a_recipe_of_ones_own_builds_on_a_packaged_one(elsewhere):
    Path("mine.py").write_text(
        "from flowgrpo_jax.configs import geneval\n\n"
        "def get_config(variant='fast'):\n    c = geneval.get_config(variant)\n"
        "    c.sample.groups = 7\n    return c\n"
    )
    for recipe, kernel in (("mine.py", "cps"), ("mine.py:full", "flow_sde")):
        config = elsewhere(f"--config={recipe}", "--config.epochs=3").config
        assert (config.sample.groups, config.sample.kernel, config.epochs) == (7, kernel, 3)
    with pytest.raises(ValueError, match=r"did you mean --config\.sample\.groups\?$"):
        elsewhere("--config=mine.py", "--config.smaple.groups=3")


@pytest.mark.parametrize("path", ["configs/geneval.py", "/tree/configs/geneval.py", "geneval.py"])
def test_outside_a_checkout_the_error_gives_the_name(elsewhere, path):
    message = r"no file .* by its name, --config=geneval:fast$"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        elsewhere(f"--config={path}:fast")
    assert user_errors.is_for_users(caught.value)


def test_which_files_are_recipes():
    """Those that train on something: neither the base nor what makes the folder a package."""
    names = recipe_files.names()
    assert {"geneval", "ocr", "pickscore", "shapes", "signs", "algorithms/nft"} <= set(names)
    assert all(knobs.load(name)["name"] != "base" for name in names)
    assert not [name for name in names if "__init__" in name]


@pytest.mark.parametrize(
    "arguments, problem, message",
    [
        ([], ValueError, "^--config is required"),
        (["--config=configs/shape.py"], FileNotFoundError, r"mean --config=shapes\? The package"),
        (["--config=geneva:fast"], FileNotFoundError, r"did you mean --config=geneval:fast\? The"),
        (["--config", "nft"], FileNotFoundError, r"did you mean --config=algorithms/nft\? The"),
        (["--config=base"], FileNotFoundError, r"no recipe 'base'; .* has algorithms/awm, algor"),
        (
            ["--config=mine/nowhere.py", "--config.epochs=3"],
            FileNotFoundError,
            r"no file and no recipe 'mine/nowhere\.py'; the package has .*geneval, ocr, .*own by",
        ),
        (["--help", "--config=nowhere"], FileNotFoundError, "no recipe 'nowhere'"),
        (["--config="], FileNotFoundError, "no recipe ''"),
        (["--config"], FileNotFoundError, "no recipe ''"),
        (["--config=geneval:fst"], ValueError, "^geneval:fst: .*full, fast"),
    ],
)
def test_a_recipe_that_is_not_there(command, arguments, problem, message):
    with pytest.raises(problem, match=message) as caught:
        command(*arguments)
    assert user_errors.is_for_users(caught.value)


@pytest.mark.parametrize(
    "code", ["c.sample.group_sise = 4", "c.epochs = 'many'", "c.epochs = int('many')"]
)
def test_an_error_in_the_code_of_a_recipe_keeps_its_traceback(command, tmp_path, code):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from flowgrpo_jax.configs import base\n\n"
        f"def get_config():\n    c = base.get_config()\n    {code}\n"
    )
    with pytest.raises(Exception) as caught:
        command(f"--config={recipe}")
    assert not user_errors.is_for_users(caught.value)


@pytest.mark.parametrize("recipe", ["shapes:fast", "algorithms/nft:fast"])
def test_a_variant_of_a_recipe_without_variants_is_refused(recipe):
    with pytest.raises(ValueError, match=f"--config={recipe}: this recipe has no variants.*:fast"):
        recipe_files.find(recipe)
    assert recipe_files.find("geneval:fast").endswith("geneval.py:fast")


def test_a_file_that_is_no_recipe_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("x = 1")
    with pytest.raises(ValueError, match=r"mine\.py: the file has no function get_config\(\)"):
        recipe_files.find(str(file))
    file.write_text("from flowgrpo_jax.configs.shapes import get_config")
    assert recipe_files.find(str(file)) == str(file)


def test_help_lists_every_flag_and_every_knob_with_a_word_on_each(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command("--help")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "algorithms/vgrpo, geneval, ocr, " in " ".join(shown.split())
    forms = ("--config=NAME|FILE (required)", "--[no]resume", "--step=")
    assert all(form in shown for form in forms)
    said = knobs.comments()
    for name in knobs.load(None):
        assert re.search(rf"^  {re.escape(name)}=", shown, re.M), name
        assert said.get(name) or said.get(name.rpartition(".")[0]), name


def test_help_shows_the_values_of_a_recipe(command, capsys):
    with pytest.raises(SystemExit):
        command("--help", "--config=shapes")
    shown = capsys.readouterr().out
    assert "Knobs of shapes;" in shown
    assert "  sample.groups=24 " in shown and "  reward.weights.shapes=1.0" in shown


@pytest.mark.parametrize("line", ["--config=a.py:b", "--config a.py:b", "-config=a.py:b"])
def test_where_a_recipe_is_named(line):
    arguments = ["train", "--resume", *line.split(), "--config.x=1"]
    assert recipe_files.on_command_line(arguments) == "a.py:b"
    assert recipe_files.on_command_line(["train", "--config.x=1"]) is None


# ------------------------------------------------------------------------------ user's errors


def caught(function, *arguments):
    with pytest.raises(Exception) as info:
        function(*arguments)
    return info.value


def test_which_errors_are_for_users(tmp_path):
    """Checks of the package, and what the system says about a file; no error within a call."""
    assert user_errors.is_for_users(caught(prompts.load, "nowhere.txt"))
    assert user_errors.is_for_users(caught(settings.require, False, "no"))
    assert user_errors.is_for_users(caught((tmp_path / "nowhere").read_text))
    assert not user_errors.is_for_users(caught(batch_plan.derived_micro_batch, [], 1))
    assert not user_errors.is_for_users(caught(knobs.flat, None))
    assert not user_errors.is_for_users(caught(int, "x"))
    assert not user_errors.is_for_users(ValueError("never raised"))


def test_a_users_mistake_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv(user_errors.TRACEBACK, raising=False)
    error = caught(settings.require, False, "first\n  second")
    error.add_note("third")

    def fail():
        with user_errors.in_one_line():
            raise error.with_traceback(error.__traceback__)

    monkeypatch.setattr(user_errors, "CHECKED", ("flowgrpo_jax", __name__.partition(".")[0]))
    assert caught_exit(fail) == 1
    assert capsys.readouterr().err == "error: first second third\n"
    monkeypatch.setenv(user_errors.TRACEBACK, "1")
    assert caught(fail) is error


def caught_exit(function):
    with pytest.raises(SystemExit) as info:
        function()
    return info.value.code
