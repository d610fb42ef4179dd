"""The directory of compiled programs that all tests share."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import compile_cache
import jax
import pytest
from compile_cache import DIRECTORY

HERE = Path(__file__).parent


def test_jax_uses_the_directory_that_child_processes_inherit():
    assert jax.config.jax_compilation_cache_dir.endswith(os.environ[DIRECTORY])
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_a_directory_that_the_user_names_is_kept(tmp_path):
    env = {DIRECTORY: "/named"}
    compile_cache.switch_on(env)
    assert env[DIRECTORY] == "/named"


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("", "--xla_backend_optimization_level=0"),
        ("--xla_dump_to=x", "--xla_dump_to=x --xla_backend_optimization_level=0"),
        ("--xla_backend_optimization_level=2", "--xla_backend_optimization_level=2"),
    ],
)
def test_a_level_of_optimisation_that_the_user_names_is_kept(tmp_path, given, wanted):
    env = {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": given}
    compile_cache.switch_on(env)
    assert env["XLA_FLAGS"] == wanted


def test_it_is_in_the_users_cache_and_named_after_jax_and_the_processor(tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    compile_cache.switch_on(env)
    chosen = Path(env[DIRECTORY])
    assert chosen.is_dir() and chosen.is_relative_to(tmp_path)
    assert jax.__version__ in chosen.name and compile_cache.processor() in chosen.name


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(tmp_path):
    """It is deleted when the process that made it ends."""
    (tmp_path / "file").touch()  # no directory can be made inside a file, not even by root
    code = "import compile_cache, os; compile_cache.switch_on(); print(os.environ['DIRECTORY'])"
    code = code.replace("DIRECTORY", DIRECTORY)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "PYTHONPATH": str(HERE)}
    del env[DIRECTORY]
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen = Path(done.stdout.strip())
    assert not chosen.is_relative_to(tmp_path / "file") and not chosen.exists()


@pytest.mark.parametrize("days, stays", [(29, True), (31, False)])
def test_old_programs_are_deleted(tmp_path, days, stays):
    file = tmp_path / "jax-0.1-old" / "jit_f-key-cache"
    file.parent.mkdir()
    file.touch()
    compile_cache.remove_old(tmp_path, now=file.stat().st_mtime + days * 24 * 3600)
    assert file.exists() == stays


@pytest.mark.parametrize("kept", [False, True])
def test_programs_of_a_second_process_are_kept(tmp_path, kept):
    """JAX by itself keeps those of the first one alone."""
    code = """
        import compile_cache, jax
        jax._src.distributed.global_state.process_id = 1
        KEPT
        jax.jit(lambda x: 2 * x)(1.0)
    """.replace("KEPT", "compile_cache.keep_of_every_process()" if kept else "")
    env = {**os.environ, DIRECTORY: str(tmp_path), "PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, check=True)
    assert bool(list(tmp_path.glob("*-cache"))) == kept
