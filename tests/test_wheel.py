"""The wheel: what pip installs has the recipes, and works far from a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel of this tree unpacks to. Building leaves nothing in the tree."""
    pytest.importorskip("setuptools", minversion="70.1", reason="older ones build no wheel alone")
    folder = tmp_path_factory.mktemp("wheel")
    outside = folder / "build.cfg"
    outside.write_text(f"[build]\nbuild_base={folder}/build\n[egg_info]\negg_base={folder}\n")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, folder],
        cwd=ROOT,
        env={**os.environ, "DIST_EXTRA_CONFIG": str(outside)},
        capture_output=True,
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed, folder, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def files(folder):
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*.py")}


def test_it_has_the_files_of_the_recipes(installed):
    recipes = files(ROOT / "configs")
    assert Path("algorithms/nft.py") in recipes
    assert files(installed / "flowgrpo_jax" / "configs") == recipes
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"flowgrpo_jax"}


def test_a_command_takes_a_recipe_by_its_name(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "flowgrpo_jax.train", "--config=geneval:fast", "--help")
    assert done.returncode == 0, done.stderr
    assert "Knobs of geneval:fast;" in done.stdout and "  sample.kernel='cps' " in done.stdout


def test_a_command_without_a_recipe_ends_with_one_line(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "flowgrpo_jax.encode", "--config=configs/geneval.py")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith(", --config=geneval\n")


OWN = """
from flowgrpo_jax.configs import shapes

def get_config():
    c = shapes.get_config()
    c.name = "mine"
    return c
"""
BUILD = """
import sys
import mine
import flowgrpo_jax
from flowgrpo_jax.assembly.run import build_run

assert flowgrpo_jax.__file__.startswith(sys.argv[1]), flowgrpo_jax.__file__
run = build_run(mine.get_config(), training=False)
print(run.plan.groups)
"""


def test_a_run_of_ones_own_recipe_is_built(installed, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "build.py").write_text(BUILD)
    done = run(installed, tmp_path, "build.py", installed)
    assert done.stdout == "24\n", done.stderr
