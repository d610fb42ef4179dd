"""TensorBoard's files."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from PIL import Image


class Events:
    """TensorBoard's scalars of every epoch. tensorboardX's own `SummaryWriter` writes in a thread,
    which ends without a word on a full disk; then its queue fills, and the run waits for ever.

    The first write creates the file. It also imports tensorboardX, which takes seconds where torch
    is installed: the first epoch need not wait for that.

    Args:
      first_epoch: what a run before this one wrote of this epoch and later is not shown any more.
      evaluated: the figures of the state that the run goes on from, for `first_epoch`.
    """

    def __init__(self, folder: epath.Path, first_epoch: int, evaluated: Mapping[str, float]):
        self._folder = folder
        self._first_epoch = first_epoch
        self._evaluated = evaluated
        self._writer: Any = None

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._open()
        self._add(epoch, values)
        self._writer.flush()

    def show(self, epoch: int, name: str, picture: Image.Image) -> None:
        if self._writer is None:
            self._open()
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        encoded = io.BytesIO()
        picture.save(encoded, format="PNG")
        width, height = picture.size
        shown = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        summary = Summary(value=[Summary.Value(tag=name, image=shown)])
        self._writer.write_event(Event(wall_time=time.time(), step=epoch, summary=summary))
        self._writer.flush()

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(self._folder / "events"))
        start = SessionLog(status=SessionLog.START)
        first = Event(wall_time=time.time(), step=self._first_epoch, session_log=start)
        self._writer.write_event(first)
        self._add(self._first_epoch, self._evaluated)

    def _add(self, epoch: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for key, value in values.items():
            if value is None or math.isnan(value):  # nothing was measured, such as a task's reward
                continue
            event = Event(wall_time=time.time(), step=epoch, summary=scalar(key, float(value)))
            self._writer.write_event(event)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
