"""Read a work directory: all that the page shows of a run, as plain data for JSON."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from flowgrpo_jax.monitors import verdicts
from flowgrpo_jax.report import about, commands
from flowgrpo_jax.report.pictures import FOLDER
from flowgrpo_jax.storage import files, logs

ROWS = 3000  # epochs that the curves show at most; of a longer run every second, third, ... epoch
NEWEST = "newest.json"  # in the folder of pictures: the evaluation whose epoch is being trained
BYTES = 5_000_000  # of a run's sheets of evaluations; of more, some of the evaluations are shown


def read(workdir: epath.Path, *, bytes_of_pictures: int = BYTES) -> dict[str, Any]:
    """Return what the page shows of a run: figures by name, verdicts, pictures and settings.

    Raises FileNotFoundError where there is no run.
    """
    metrics, newest = workdir / "metrics.jsonl", _object(workdir / FOLDER / NEWEST)
    if not metrics.exists() and not newest:
        raise FileNotFoundError(
            f"{workdir} holds no run, for there is no metrics.jsonl: give the --workdir of a"
            " training run"
        )
    rows = logs.read(metrics) if metrics.exists() else []
    if newest and newest["epoch"] == max((row["epoch"] + 1 for row in rows), default=0):
        rows = [*rows, newest]  # else its epoch has ended, or the run went back behind it
    config = _object(workdir / "config.json")
    weights = config.get("reward", {}).get("weights", {})
    options = config.get("algorithm", {}).get("options", {})
    judged = verdicts.verdicts(rows, weights, options)
    last, made = max(judged, default=None), _object(workdir / FOLDER / about.FILE)
    return {
        "workdir": str(workdir),
        "written": time.time(),
        "epoch": max((row["epoch"] + 1 for row in rows if "reward" in row), default=0),
        "epochs": config.get("epochs", 0),
        "weights": weights,
        "images_per_epoch": _images(config),
        "series": columns(thinned(rows)),
        "verdicts": [v._asdict() for v in judged[last]] if last is not None else [],
        "judged": last,
        "worst": {str(epoch): verdicts.worst(found) for epoch, found in judged.items()},
        "about": made,
        "commands": commands.lines(str(workdir), config, made),
        "sheets": sheets(workdir / FOLDER, {row["epoch"] for row in rows}, bytes_of_pictures),
    }


def save_newest(workdir: epath.Path, epoch: int, evaluated: Mapping[str, float]) -> None:
    """Write the figures of an evaluation for the page, which the metrics get with its epoch's."""
    (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
    row = json.dumps(logs.plain({"epoch": epoch, **evaluated}))
    files.replace(workdir / FOLDER / NEWEST, row)


def _object(file: epath.Path) -> dict[str, Any]:
    try:
        return files.read_object(file)
    except (OSError, ValueError):  # an older run has none, or it is just being written
        return {}


def _images(config: Mapping[str, Any]) -> int:
    sample = config.get("sample", {})
    return int(sample.get("groups", 0)) * int(sample.get("group_size", 0))


def thinned(rows: Sequence[Mapping[str, Any]], most: int = ROWS) -> list[Mapping[str, Any]]:
    """At most about `most` rows, evenly chosen, and all of those that have an evaluation."""
    step = max(1, -(-len(rows) // most))
    return [r for i, r in enumerate(rows) if i % step == 0 or any(k.startswith("eval") for k in r)]


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Figures by name, one entry for each row; None where a row lacks it. `hours` are added: the
    time since the start, in which epochs that are not among the rows count as their neighbours."""
    names = dict.fromkeys(["epoch", *(key for row in rows for key in row)])
    found = {name: [rounded(row.get(name)) for row in rows] for name in names}
    hours, total, before = [], 0.0, -1
    for row in rows:
        epochs = max(0, row["epoch"] - before)
        total += epochs * (row.get("seconds") or 0.0) + (row.get("eval_seconds") or 0.0)
        hours.append(rounded(total / 3600))
        before = row["epoch"]
    return found | {"hours": hours}


def rounded(value: Any) -> float | None:
    """A number with five digits, which is what a curve can show; None for what is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def sheets(folder: epath.Path, epochs: set[int], budget: int) -> dict[str, list[dict[str, Any]]]:
    """Return the sheets of pictures by kind, in order; of extremes and training the last one.

    Args:
      epochs: those of the metrics. A sheet of a later one is left from before a run went back.
      budget: bytes that the sheets of evaluations may have. Some are left out where they have more,
        but never the first and the last.
    """
    names: dict[str, list[tuple[int, epath.Path]]] = {}
    for file in folder.glob("*-*.json") if folder.exists() else []:
        kind, _, epoch = file.stem.rpartition("-")
        if epoch.isdigit() and int(epoch) in epochs:
            names.setdefault(kind, []).append((int(epoch), file))
    chosen = {kind: [file for _, file in sorted(found)] for kind, found in names.items()}
    for kind in ("extremes", "training"):
        chosen[kind] = chosen.get(kind, [])[-1:]
    chosen["evaluation"] = evenly(chosen.get("evaluation", []), budget)
    return {kind: [s for s in map(sheet, found) if s] for kind, found in chosen.items()}


def evenly(found: list[epath.Path], budget: int) -> list[epath.Path]:
    """Return as many of the sheets as the budget allows, evenly, with the first and the last."""
    if not found:
        return []
    size = max(found[-1].with_suffix(".webp").stat().length, 1)
    most = max(2, budget // size)
    if len(found) <= most:
        return found
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def sheet(file: epath.Path) -> dict[str, Any] | None:
    """Return a sheet with its pictures as a data URI; None where it is damaged or not complete."""
    try:
        head = json.loads(file.read_text())
        image = base64.b64encode(file.with_suffix(".webp").read_bytes()).decode()
    except (OSError, ValueError):
        return None
    return head | {"image": f"data:image/webp;base64,{image}"}
