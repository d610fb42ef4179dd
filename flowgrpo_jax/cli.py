"""What the entry points share: flags, the work directory, stopping on a signal."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

CONFIG_FILE = "config.json"


def define_flags(*, config: bool) -> None:
    """`--config FILE`, with any knob of it as `--config.section.key=value`."""
    logging.set_verbosity(logging.WARNING)
    if config:
        config_flags.DEFINE_config_file("config", None, "A Python file with get_config().")
        flags.mark_flag_as_required("config")


def restart_with_huge_pages() -> None:
    """On Linux, run this command again in place with malloc asking for huge pages.

    XLA on the CPU allocates its large temporaries anew at every call; with 4 kB pages the page
    faults take a third of the time (docs/performance.md). glibc reads the setting only at start.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def config() -> ConfigDict:
    return flags.FLAGS.config


def prepare(workdir: Path, config: ConfigDict, resume: bool) -> None:
    """Make the work directory and write the resolved config.

    Raises FileExistsError when it holds another run and this is no resume.
    """
    if not resume and any((workdir / "checkpoints").glob("[0-9]*")):
        raise FileExistsError(
            f"{workdir} already holds a run: add --resume to go on with it, or give another"
            " --workdir"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n")


class Stop:
    """Turns SIGINT and SIGTERM into a request that the loop reads between programs.

    A second signal interrupts at once.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Stop:
        self._previous = {s: signal.signal(s, self._request) for s in self.signals}
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(f"\n{signal.Signals(number).name}: saving and stopping", flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
