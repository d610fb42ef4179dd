"""Shared parts of the entry points: flags and the work directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from flowgrpo_jax.command_line import exit_status, usage, user_errors
from flowgrpo_jax.compilation import compilation_cache, compilation_report
from flowgrpo_jax.storage import files, outputs

CONFIG_FILE = "config.json"


def define_flags(*, config: bool) -> None:
    """`--config NAME|FILE`, with any knob of it as `--config.section.key=value`."""
    logging.set_verbosity(logging.WARNING)
    if config:
        config_flags.DEFINE_config_file("config", None, "A recipe's name or file (`usage.parse`).")
        flags.mark_flag_as_required("config")


def define_cache_flag() -> None:
    """Define the flag that `compiling` reads."""
    flags.DEFINE_string(
        "compilation_cache",
        compilation_cache.AUTOMATIC,
        "Where compiled programs are kept: a directory, a bucket, auto (the user's cache directory;"
        " the work directory if it is in a bucket or of several processes) or off.",
    )


@contextmanager
def compiling(workdir: epath.PathLike | None = None) -> Iterator[None]:
    """Keep compiled programs where the flags say it, and report what is being compiled.

    `workdir` is that of a run. To be entered after `connect`, before the first compilation.
    """
    place = epath.Path(workdir) if workdir else None
    compilation_cache.start(flags.FLAGS.compilation_cache, place)
    with compilation_report.reported():
        yield


def run(main: Callable[[list[str]], None]) -> None:
    """Run an entry point: read its flags, and end with one line for a user's mistake, and with the
    status that is meant though a program or a reward is still at work."""
    with user_errors.in_one_line():
        app.run(exit_status.ending()(main), flags_parser=usage.parse)


def config() -> ConfigDict:
    return flags.FLAGS.config


def prepare(workdir: epath.Path, resume: bool) -> None:
    """Make the work directory, before anything that takes long.

    Raises FileExistsError when it holds another run and this is no resume, OSError when nothing can
    be written to it.
    """
    outputs.check_directory(workdir, "--workdir")
    kept, best, good = (
        {step.name for step in (workdir / folder).glob("[0-9]*") if step.name.isdigit()}
        for folder in ("checkpoints", "best", "good")
    )
    if resume:
        return
    if kept or (best | good) - {"0"}:
        raise FileExistsError(
            f"{workdir} already holds a run: add --resume to go on with it, or give another"
            " --workdir"
        )
    for folder, found in {"best": best, "good": good}.items():
        if found and jax.process_index() == 0:  # of a run that saved nothing, at its start
            (workdir / folder).rmtree()


def record(workdir: epath.Path, config: ConfigDict) -> None:
    """Write the resolved config. A resumed run does so once its checkpoint has been read, so that a
    wrong setting does not replace the record of the right one."""
    if jax.process_index() == 0:
        files.replace(workdir / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")
