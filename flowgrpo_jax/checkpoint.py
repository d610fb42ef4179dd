"""Checkpoints of everything that a resumed run needs, through Orbax."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from flowgrpo_jax.models import lora
from flowgrpo_jax.models.sd3 import SD3
from flowgrpo_jax.types import Params, TrainState

log = logging.getLogger(__name__)
BASE = "base"  # the name of the policy before training
FOLDERS = ("checkpoints", "best")  # of a work directory


class Checkpoints:
    """The checkpoints of one run by step: named trees of arrays and a JSON record each."""

    def __init__(self, directory: epath.PathLike, keep: int | None = None):
        self.directory = epath.Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def write(self, step: int, trees: dict[str, Any], record: dict[str, Any]) -> None:
        """Write in the background; `wait` and `close` wait for the last one.

        Raises OSError where writing cannot begin. If the one before could not be completed, that is
        a warning: this one takes its place.
        """
        try:
            self.wait()
        except OSError as error:
            log.warning("%s", error)
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        composite = ocp.args.Composite(**items, record=ocp.args.JsonSave(record))
        with self._complete():
            if step in self.steps():  # a damaged one that `newest` passed over
                self._manager.delete(step)
            self._manager.save(step, args=composite, force=True)

    @contextmanager
    def _complete(self) -> Iterator[None]:
        """What goes wrong inside is an OSError that names the directory, and leaves no parts."""
        try:
            yield
        except Exception as error:
            for part in self.directory.glob("*.orbax-checkpoint-tmp"):
                part.rmtree(missing_ok=True)
            raise OSError(
                f"a checkpoint could not be written to {self.directory}: {error}"
            ) from error

    def read(self, step: int, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The named trees with the shapes, dtypes and shardings of `like`, and the record."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = self._manager.restore(
            step, args=ocp.args.Composite(**items, record=ocp.args.JsonRestore())
        )
        return {name: restored[name] for name in like}, restored["record"]

    def record(self, step: int) -> dict[str, Any]:
        """The record alone."""
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["record"]

    def newest(self, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The newest checkpoint that can be read; damaged ones are passed over with a warning.

        Raises FileNotFoundError when there is none, ValueError when none can be read.
        """
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}: start without --resume")
        problem: Exception | None = None
        for step in reversed(steps):
            try:
                return self.read(step, like)
            except Exception as error:
                log.warning("checkpoint %s/%d cannot be read: %s", self.directory, step, error)
                problem = problem or error
        raise ValueError(
            f"none of the checkpoints {steps} in {self.directory} can be read. Either they are"
            " damaged (restore them from a copy) or they belong to another model or LoRA (set"
            f" lora.rank, lora.targets and model.path to the run's config.json): {problem}"
        ) from problem

    def save(self, epoch: int, state: TrainState, record: dict[str, Any]) -> None:
        """A training state after `epoch` epochs."""
        self.write(epoch, _parts(state), record)

    def resume(self, like: TrainState) -> tuple[TrainState, int]:
        """The newest readable training state, and the epoch to go on with."""
        trees, record = self.newest(_parts(like))
        return dataclasses.replace(trees["state"], ema=trees["ema"]), int(record["epoch"])

    def wait(self) -> None:
        """Until all is written. Raises OSError where the last one could not be."""
        with self._complete():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def rescue(epoch: int, state: TrainState, record: dict[str, Any], error: OSError) -> OSError:
    """Write the state to a temporary directory; `error`, which kept it from its place, with the way
    back."""
    spare = Checkpoints(epath.Path(tempfile.mkdtemp()) / "checkpoints")
    spare.save(epoch, state, record)
    spare.close()
    return OSError(
        f"{error}. The state after epoch {epoch} is in {spare.directory}: make room, move its"
        f" folder {epoch} into the run's checkpoints, and go on with --resume"
    )


class Best:
    """The checkpoint with the highest value of an evaluated reward, in a directory of its own."""

    def __init__(self, directory: epath.PathLike, reward: str):
        self.checkpoints = Checkpoints(directory, keep=1)
        self.figure = f"eval/{reward}"
        self.value = -math.inf
        for step in self.checkpoints.steps():
            try:
                self.value = float(self.checkpoints.record(step)[self.figure])
            except Exception as error:  # another reward's, or damaged: the next one replaces it
                log.warning("%s/%d is passed over: %s", self.checkpoints.directory, step, error)

    def offer(self, epoch: int, state: TrainState, report: dict[str, float]) -> None:
        """Keep the state after `epoch` epochs if its evaluation is the best so far."""
        value = report[self.figure]
        if value > self.value:
            self.value = value
            self.checkpoints.save(epoch, state, {"epoch": epoch, self.figure: value})


def _parts(state: TrainState) -> dict[str, Any]:
    """The EMA is apart: evaluation reads it alone."""
    without: Any = {"ema": None}
    return {"state": dataclasses.replace(state, **without), "ema": state.ema}


def load_lora(source: epath.PathLike, model: SD3) -> Params:
    """A policy's adapter: "base", a run's EMA weights, or an exported LoRA.

    Args:
      source: "base"; a work directory or its `checkpoints` (newest), `checkpoints/STEP` or `best`;
        an export directory or .safetensors file.
    """
    if str(source) == BASE:
        return model.reference(model.init_lora(jax.random.key(0)))
    path = epath.Path(source)
    step = int(path.name) if path.name.isdigit() and path.parent.name in FOLDERS else None
    folder = path.parent if step is not None else path
    if not folder.exists():
        raise FileNotFoundError(
            f"checkpoint {source!r} does not exist: give base, a work directory or an exported LoRA"
        )
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if folder.name in FOLDERS:
        like = {"ema": {k: jnp.zeros(v.shape, v.dtype) for k, v in model.lora_shapes.items()}}
        checkpoints = Checkpoints(folder)
        if step is not None and step not in checkpoints.steps():
            raise FileNotFoundError(
                f"no checkpoint {step} in {folder}: choose from {checkpoints.steps()}"
            )
        trees, _ = checkpoints.newest(like) if step is None else checkpoints.read(step, like)
        checkpoints.close()
        return trees["ema"]
    file, spec = lora.read_spec(str(path))
    if spec.scale != model.lora_spec.scale:
        raise ValueError(
            f"{file} has alpha / rank = {spec.scale}, the config {model.lora_spec.scale}: set"
            f" lora.rank={spec.rank} and lora.alpha={spec.alpha}"
        )
    return lora.read(file, model.lora_shapes)
