"""The cache of compiled programs, and the report of what is being compiled."""

import io
import os
import re
import stat
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from flowgrpo_jax.compilation import compilation_cache, compilation_report
from flowgrpo_jax.training import progress

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """JAX without a cache, and a user without files; the cache of the tests comes back later."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def compile_once():
    """Compile a program, of which nothing in the process's memory is reused."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.clear_caches()
    jax.jit(lambda x: jnp.tanh(x) + 41).lower(jnp.ones(3)).compile()


def events(action):
    """Count JAX's cache events while `action` runs."""
    seen = []
    jax.monitoring.register_event_listener(listener := lambda event, **_: seen.append(event))
    try:
        action()
    finally:
        jax.monitoring.unregister_event_listener(listener)
    return {
        name: sum(event.endswith(f"cache_{name}") for event in seen) for name in ("hits", "misses")
    }


def test_programs_are_kept_in_the_users_cache_directory_by_default(fresh, tmp_path):
    compilation_cache.start("auto")
    assert events(compile_once)["misses"]
    folder = tmp_path / "xdg" / "flowgrpo_jax" / "compiled"
    assert list(folder.glob("*-cache"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # an entry is code that will be run
    seen = events(compile_once)
    assert seen["hits"] and not seen["misses"]


@pytest.mark.parametrize("where", ["off", "variable"])
def test_the_cache_can_be_switched_off(fresh, tmp_path, where):
    if where == "variable":
        jax.config.update("jax_enable_compilation_cache", False)  # JAX_ENABLE_COMPILATION_CACHE=0
    compilation_cache.start("off" if where == "off" else "auto")
    assert events(compile_once) == {"hits": 0, "misses": 0}
    assert not (tmp_path / "xdg").exists()


def test_jaxs_variable_moves_the_cache_and_the_flag_goes_before_it(fresh, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "variable"))
    compilation_cache.start("auto")
    compile_once()
    assert list((tmp_path / "variable").iterdir()) and not (tmp_path / "xdg").exists()
    jax_cache.reset_cache()
    compilation_cache.start(str(tmp_path / "flag"))
    compile_once()
    assert list((tmp_path / "flag").iterdir())


def test_a_cache_that_cannot_be_made_is_a_warning_and_the_run_goes_on(fresh, tmp_path, caplog):
    (tmp_path / "file").touch()
    compilation_cache.start(str(tmp_path / "file" / "cache"))
    assert "--compilation_cache" in caplog.text
    assert events(compile_once) == {"hits": 0, "misses": 0}


def test_a_run_in_a_bucket_keeps_its_programs_there():
    place = compilation_cache.default_place(epath.Path("gs://bucket/run"))
    assert str(place) == "gs://bucket/run/compiled"


def test_runs_of_several_processes_keep_their_programs_in_the_work_directory(monkeypatch):
    assert Path("runs/a") not in compilation_cache.default_place(epath.Path("runs/a")).parents
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert str(compilation_cache.default_place(epath.Path("runs/a"))) == "runs/a/compiled"


def test_a_relative_xdg_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    place = compilation_cache.default_place(None)
    assert place == tmp_path / ".cache" / "flowgrpo_jax" / "compiled"


def test_an_entry_is_never_seen_half_written(tmp_path):
    """Many writers and a reader: whoever finds the file finds all of it."""
    file = epath.Path(f"{compilation_cache.WHOLE}{tmp_path}") / "entry"
    data, found, done = b"x" * 4_000_000, set(), threading.Event()

    def read():
        while not done.is_set():
            if file.exists():
                found.add(len(file.read_bytes()))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=lambda: file.write_bytes(data)) for _ in range(4)]
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert found <= {len(data)} and os.listdir(tmp_path) == ["entry"]


def test_a_write_that_fails_leaves_no_entry(tmp_path, monkeypatch):
    def full_disk(path, data):
        path.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    file = epath.Path(f"{compilation_cache.WHOLE}{tmp_path}") / "entry"
    with pytest.raises(OSError, match="No space"):
        file.write_bytes(b"x")
    assert not os.listdir(tmp_path)


def test_entries_that_nobody_has_used_for_months_are_removed(fresh, tmp_path):
    old = time.time() - compilation_cache.UNUSED - 60
    for name in ("new-cache", "old-cache", "read-cache"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "old-cache", (old, old))
    os.utime(tmp_path / "read-cache", (time.time(), old))
    compilation_cache.start(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["new-cache", "read-cache"]


def test_what_is_compiled_is_said_in_plain_lines_where_there_is_no_terminal():
    report = compilation_report.Report(stream := io.StringIO())
    report.begin("jit(sample)", 100.0)
    for second in range(101, 165):
        assert report.show(float(second))
    report.end(165.0)
    assert not report.show(166.0)
    assert stream.getvalue().splitlines() == [
        "compiling sample: 2 s",
        "compiling sample: 32 s",
        "compiling sample: 62 s",
        "compiled sample in 65 s",
    ]


def test_quick_compilations_are_not_mentioned():
    report = compilation_report.Report(stream := io.StringIO())
    report.begin("jit(add)", 0.0)
    report.show(0.5)
    report.end(1.0)
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_one_line_is_updated_and_removed():
    report = compilation_report.Report(stream := Terminal())
    report.begin("jit(accumulate)", 0.0)
    report.show(3.0)
    report.show(4.0)
    report.end(5.0)
    text = stream.getvalue()
    assert "\n" not in text
    parts = re.split(r"\r", text)
    assert "compiling accumulate: 3 s" in parts and "compiling accumulate: 4 s" in parts
    assert not parts[-1].strip() and not parts[-2].strip()  # blanks over it, and back


def test_jax_tells_the_report_what_it_compiles(fresh, monkeypatch):
    monkeypatch.setattr(compilation_report, "FIRST", 0.0)
    seen = threading.Event()

    class Stream(io.StringIO):
        def write(self, text):
            if "compiling slow_program" in text:
                seen.set()
            return super().write(text)

    def slow_program(x):
        return x + 1

    def wait(event, value, *, fun_name="", **_):  # JAX's compiler waits until the line is there
        if event == compilation_report.COMPILE and "slow_program" in fun_name:
            assert seen.wait(60)

    with compilation_report.reported(stream := Stream()):
        jax.monitoring.register_scalar_listener(wait)
        try:
            jax.jit(slow_program)(jnp.ones(3))
        finally:
            jax.monitoring.unregister_scalar_listener(wait)
    assert "compiled slow_program in" in stream.getvalue()


def test_the_rate_and_the_time_left_do_not_count_the_first_epoch(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    bar = progress.progress_bar("run", 3, 13, active=True)
    bar._time = time.time
    bar.start_t = bar.last_print_t = now[0]
    figures = {"reward": 0.5, "images_per_second": 7.0}
    now[0] += 60.0
    progress.show_epoch(bar, figures, {}, first=True)
    assert bar.n == 4 and bar.format_dict["rate"] is None and "?epoch/s" in str(bar)
    assert "img/s" not in str(bar)
    now[0] += 10.0
    progress.show_epoch(bar, figures, {}, first=False)
    assert "01:20" in str(bar) and "10.0" in str(bar)  # 8 epochs of 10 s are left
    assert "01:10<" in str(bar)  # what has passed counts all
    now[0] += 20.0
    progress.show_epoch(bar, figures, {}, first=False)
    bar.close()
    assert "15.00s/epoch" in capsys.readouterr().err.split("\r")[-1]  # the mean of 10 and 20 s
