"""The page: one HTML file with the data, the pictures and the programs that it needs in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jax
from etils import epath

from flowgrpo_jax.monitors import verdicts
from flowgrpo_jax.report import run_data
from flowgrpo_jax.storage import files, logs

FILE = "report.html"


def save(workdir: epath.Path, epoch: int, evaluated: Mapping[str, float]) -> None:
    """Write the page of a run to its work directory, if something was evaluated since the last one.
    An error is a warning.

    Args:
      evaluated: the figures of the evaluation at `epoch`, which may not be in the metrics yet.
    """
    if jax.process_index() > 0 or not evaluated:
        return
    with logs.warn_on_error("the run's page"):
        run_data.save_newest(workdir, epoch, evaluated)
        files.replace(workdir / FILE, html([run_data.read(workdir)]))


def announced(workdir: epath.Path, every: int) -> str:
    """Return the line that says, when a run starts, where its page will be."""
    if not every:
        return "page        none, for the run is never evaluated: eval.every is 0"
    return f"page        {workdir / FILE}, at the first evaluation and then every {every} epochs"


def html(runs: Sequence[dict[str, Any]], *, live: bool = False) -> str:
    """Return the page of runs, as `run_data.read` gives them; the first one's pictures come first.

    Args:
      live: the page is served, and asks for new data from time to time.
    """
    names = distinct([run["workdir"] for run in runs])
    runs = [run | {"name": name} for run, name in zip(runs, names)]
    shown = {"runs": runs, "live": live, "lower": verdicts.LOWER_IS_BETTER}
    data = json.dumps(shown, allow_nan=False)
    parts = {
        "TITLE": _escaped(", ".join(run["name"] for run in runs)),
        "UPLOT_CSS": _file("vendor/uPlot.min.css"),
        "CSS": _file("page.css"),
        "DATA": data.replace("<", "\\u003c"),  # no prompt may end the script
        "UPLOT": _file("vendor/uPlot.iife.min.js"),
        "CHARTS": _file("charts.js"),
        "PICTURES": _file("pictures.js"),
        "SCRIPT": _file("page.js"),
        "LIVE": _file("live.js") if live else "",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def distinct(workdirs: Sequence[str]) -> list[str]:
    """Return the last folder of each path, with as many above it as tell all of them apart."""
    parts = [[p for p in place.split("/") if p] or [place] for place in workdirs]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(set(workdirs)):
            break
    return names


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
