"""What a run leaves to look at: metrics, TensorBoard events, captioned picture grids."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw


class Metrics:
    """One JSON object an epoch in `metrics.jsonl`, and the same to TensorBoard and wandb.

    Args:
      first_epoch: rows of this epoch and later are dropped: a resumed run writes them again.
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
        kept = [row for row in read(self.file) if row["epoch"] < first_epoch]
        self.text = "".join(json.dumps(row) + "\n" for row in kept)
        self.file.write_text(self.text)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_epoch)
        if wandb:
            self.wandb = _start_wandb(workdir, config)

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        row = {"epoch": epoch, **plain(values)}
        line = json.dumps(row) + "\n"
        if "://" in str(self.file):  # nothing can be appended to in a bucket
            self.text += line
            self.file.write_text(self.text)
        else:
            with self.file.open("a") as file:
                file.write(line)
        if self.events:
            for key, value in values.items():
                self.events.add_scalar(key, float(value), epoch)
            self.events.flush()
        if self.wandb:
            self.wandb.log(row, step=epoch)

    def close(self) -> None:
        if self.events:
            self.events.close()
        if self.wandb:
            self.wandb.finish()


def read(file: epath.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a crash is passed over."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def plain(value: Any) -> Any:
    """As JSON knows it: numbers that are not finite become null, also inside of dictionaries."""
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
    mark = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
    return wandb.init(
        project="flowgrpo_jax",
        name=workdir.name,
        id=mark,  # of the work directory: a resumed run goes on in the same place
        resume="allow",
        dir=str(workdir),
        config=dict(config or {}),
    )


def grid(
    images: np.ndarray, captions: Sequence[str], columns: int = 6, side: int = 128
) -> Image.Image:
    """Pictures uint8 [B, H, W, 3] in rows, each `side` px wide with its caption below."""
    line, rows = 14, math.ceil(len(images) / columns)
    cell = (side + 6, side + 2 * line + 6)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * cell[0] + 3, i // columns * cell[1] + 3
        picture = Image.fromarray(np.asarray(image))
        height = round(side * picture.height / picture.width)
        filter_ = Image.Resampling.LANCZOS if picture.width > side else Image.Resampling.BICUBIC
        sheet.paste(picture.resize((side, min(height, side)), filter_), (x, y))
        draw.multiline_text((x, y + side + 1), _wrap(caption, side // 6), fill="black", spacing=1)
    return sheet


def _wrap(text: str, width: int) -> str:
    """Two lines of at most `width` letters."""
    first, rest = "", text.split()
    while rest and len(first) + len(rest[0]) < width:
        first = f"{first} {rest.pop(0)}".strip()
    return f"{first}\n{' '.join(rest)[:width]}"
