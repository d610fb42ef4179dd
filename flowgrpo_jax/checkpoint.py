"""Checkpoints of everything that a resumed run needs, through Orbax."""

from __future__ import annotations

import dataclasses
import logging
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


class Checkpoints:
    """The checkpoints of one run by step: named trees of arrays and a JSON record each."""

    def __init__(self, directory: epath.PathLike, keep: int | None = None):
        self.directory = epath.Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def write(self, step: int, trees: dict[str, Any], record: dict[str, Any]) -> None:
        """Write in the background; `close` waits for the last one."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        if step in self.steps():  # a damaged one that `newest` passed over
            self._manager.delete(step)
        self._manager.save(
            step, args=ocp.args.Composite(**items, record=ocp.args.JsonSave(record)), force=True
        )

    def read(self, step: int, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The named trees with the shapes, dtypes and shardings of `like`, and the record."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = self._manager.restore(
            step, args=ocp.args.Composite(**items, record=ocp.args.JsonRestore())
        )
        return {name: restored[name] for name in like}, restored["record"]

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
        """Until all is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _parts(state: TrainState) -> dict[str, Any]:
    """The EMA is apart: evaluation reads it alone."""
    without: Any = {"ema": None}
    return {"state": dataclasses.replace(state, **without), "ema": state.ema}


def load_lora(source: epath.PathLike, model: SD3) -> Params:
    """A policy's adapter: "base", a run's EMA weights, or an exported LoRA.

    Args:
      source: "base"; a work directory or its `checkpoints` (newest) or `checkpoints/STEP`; an
        export directory or .safetensors file.
    """
    if str(source) == BASE:
        return lora.reference(model.init_lora(jax.random.key(0)))
    path = epath.Path(source)
    step = int(path.name) if path.name.isdigit() and path.parent.name == "checkpoints" else None
    folder = path.parent if step is not None else path
    if not folder.exists():
        raise FileNotFoundError(
            f"checkpoint {source!r} does not exist: give base, a work directory or an exported LoRA"
        )
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if folder.name == "checkpoints":
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
