"""The metrics of a run, for its file, TensorBoard and Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from etils import epath
from PIL import Image

from flowgrpo_jax.storage import files
from flowgrpo_jax.storage.events import Events

log = logging.getLogger(__name__)
EVALUATED = ("eval/", "eval_error/", "eval_seconds", "monitor/")  # how its figures' names begin


class Metrics:
    """One JSON object an epoch in `metrics.jsonl`, and the same to TensorBoard and wandb.

    Args:
      first_epoch: rows of this epoch and later are dropped: a resumed run writes them again. The
        evaluation at this epoch stays, for it is that of the state which the run goes on from; it
        may have been the last of a run that is prolonged, and becomes a part of its epoch's row.
      active: false in all processes of a run but the first, which alone writes.
    """

    def __init__(
        self,
        workdir: epath.Path,
        first_epoch: int = 0,
        *,
        tensorboard: bool = False,
        wandb: bool = False,
        config: Mapping[str, Any] | None = None,
        active: bool = True,
    ):
        self.file = workdir / "metrics.jsonl"
        self.events = None
        self.wandb = None
        self.active = active
        if not active:
            return
        rows = read(self.file)
        self.text = lines(row for row in rows if row["epoch"] < first_epoch)
        last = [evaluation(row) for row in rows if row["epoch"] == first_epoch]
        self.evaluated = last[-1] if last and len(last[-1]) > 1 else {}
        self.unwritten = ""  # rows that a full disk refused
        self.torn = False  # the file holds something else than `text`
        files.replace(self.file, self.text + lines([self.evaluated] if self.evaluated else []))
        if tensorboard:
            evaluated = {k: v for k, v in self.evaluated.items() if k != "epoch"}
            self.events = Events(workdir / "tensorboard", first_epoch, evaluated)
        if wandb:
            self.wandb = _start_wandb(workdir, config)

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        row = {"epoch": epoch, **plain(values)}
        if self.evaluated.get("epoch") == epoch:
            row, self.evaluated, self.torn = self.evaluated | row, {}, True
        self.unwritten += lines([row])
        with warn_on_error(str(self.file)):
            if self.torn or files.in_bucket(self.file):  # nothing can be appended to in a bucket
                files.replace(self.file, self.text + self.unwritten)
            else:
                self.torn = True  # until all is written: a full disk may take a part of a row
                with self.file.open("a") as file:
                    file.write(self.unwritten)
            self.text += self.unwritten
            self.unwritten, self.torn = "", False
        with warn_on_error("TensorBoard's events"):
            if self.events:
                self.events.write(epoch, values)
        with warn_on_error("Weights & Biases"):
            if self.wandb:
                self.wandb.log(row, step=epoch)

    def show(self, epoch: int, name: str, draw: Callable[[], Image.Image]) -> None:
        """Show a picture in TensorBoard and Weights & Biases. It is drawn if one of them is on."""
        if not self.active or not (self.events or self.wandb):
            return
        with warn_on_error("a picture for TensorBoard or Weights & Biases"):
            picture = draw()
            if self.events:
                self.events.show(epoch, name, picture)
            if self.wandb:
                import wandb

                self.wandb.log({name: wandb.Image(picture)}, step=epoch)

    def close(self, *, failed: bool = False) -> None:
        """Write what is still to be written. Weights & Biases marks a `failed` run as such."""
        with warn_on_error(str(self.file)):
            if self.active and self.unwritten:
                files.replace(self.file, self.text + self.unwritten)
        with warn_on_error("TensorBoard's events"):
            if self.events:
                self.events.close()
        with warn_on_error("Weights & Biases"):
            if self.wandb:
                self.wandb.finish(exit_code=int(failed))


@contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """Turn any error inside into a warning, because a log that is lost should not end a run.

    The errors of buckets and of wandb have no common type.
    """
    try:
        yield
    except Exception as error:
        log.warning("%s could not be written: %s; training goes on", what, error)


def read(file: epath.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a crash is passed over."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def evaluation(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of an evaluation in a row, and the row's epoch."""
    return {k: v for k, v in row.items() if k == "epoch" or k.startswith(EVALUATED)}


def plain(value: Any) -> Any:
    """Convert a value for JSON: numbers that are not finite become null, also in dictionaries."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (str, int, list, tuple)) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _start_wandb(workdir: epath.Path, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "log.wandb=True, but wandb is not installed: pip install wandb, or set it to False"
        ) from error
    mark = hashlib.sha256(str(files.absolute(workdir)).encode()).hexdigest()[:16]
    return wandb.init(
        project="flowgrpo_jax",
        name=workdir.name,
        id=mark,  # of the work directory: a resumed run goes on in the same place
        resume="allow",
        dir=str(workdir),
        config=dict(config or {}),
    )
