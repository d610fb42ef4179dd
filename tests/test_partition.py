"""Between them, the environments of CI run every test file."""

import re
from pathlib import Path

import partition
import pytest
from partition import HERE

FILES = sorted(HERE.glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_runs_somewhere(file):
    assert any(partition.runs(file, environment) for environment in partition.ENVIRONMENTS)


def test_the_files_that_run_in_both_exist():
    assert {file.stem for file in FILES} >= partition.ON_BOTH


@pytest.mark.parametrize(
    "source, environment",
    [
        ("import jax\ndef test_one(tmp_path): ...", "newest"),
        ('torch = pytest.importorskip("torch")', "torch"),
        ("from torch_models import write_pipeline", "torch"),
        ("def test_one(tmp_path, checkpoint): ...", "torch"),
        ("from flowgrpo_jax.checkpoints import checkpoint", "newest"),
    ],
)
def test_a_new_file_runs_once_where_it_finds_what_it_needs(tmp_path, source, environment):
    file = tmp_path / "test_new.py"
    file.write_text(source)
    assert partition.environments(file) == (environment,)


def test_each_environment_names_the_files_of_the_other():
    for environment in partition.ENVIRONMENTS:
        said = set(re.findall(r"test_\w+", partition.left_out(environment)))
        assert said == {file.stem for file in FILES if not partition.runs(file, environment)}
        assert said


def test_the_command_of_the_readme_is_the_one_that_ci_calls():
    root = Path(HERE).parent
    (command,) = re.findall(r"&& (pytest -n .*)", (root / "README.md").read_text())
    assert f'python" -m {command}' in (root / ".ci" / "run").read_text()
