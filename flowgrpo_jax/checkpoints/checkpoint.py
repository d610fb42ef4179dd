"""Checkpoints: named trees of arrays and a JSON record for each step, through Orbax."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath

from flowgrpo_jax import sharding
from flowgrpo_jax.checkpoints.run_record import SHAPING, shaping
from flowgrpo_jax.storage import files
from flowgrpo_jax.types import TrainState

log = logging.getLogger(__name__)
FOLDERS = ("checkpoints", "best", "good")  # of a work directory


class Checkpoints:
    """The checkpoints of one run by step: named trees of arrays and a JSON record each.

    Args:
      keep: how many of the last checkpoints are kept; None keeps all.
      own: whether this run writes them; it then removes what a killed run left half-written. Who
        only reads must not, for the run may be writing meanwhile.
    """

    def __init__(self, directory: epath.PathLike, keep: int | None = None, *, own: bool = False):
        import orbax.checkpoint as ocp  # takes half a second: only where there is a checkpoint

        self.directory = files.absolute(directory)
        # Processes that save to two directories at once must not meet at one barrier for both.
        barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.directory.name)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=own,
            multiprocessing_options=barriers,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """List the steps that the first process sees; others may see a new one on a disk later."""
        return sharding.from_first_process(sorted(self._manager.all_steps()))

    def write(self, step: int, trees: dict[str, Any], record: dict[str, Any]) -> None:
        """Write in the background; `wait` and `close` wait for the last one.

        Raises OSError where writing cannot begin. If the one before could not be completed, that is
        a warning: this one takes its place. Of several processes some may not know of it, so that
        it is an error there.
        """
        import orbax.checkpoint as ocp

        try:
            self.wait()
        except OSError as error:
            if jax.process_count() > 1:
                raise
            log.warning("%s", error)
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        composite = ocp.args.Composite(**items, record=ocp.args.JsonSave(record))
        with self._complete():
            if step in self.steps():  # a damaged one that `newest` passed over
                self._manager.delete(step)
            self._manager.save(step, args=composite, force=True)

    @contextmanager
    def _complete(self) -> Iterator[None]:
        """Turn an error inside into an OSError that names the directory; remove partial files."""
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # a lost peer is no fault of the directory
            if jax.process_count() == 1:  # others may still be writing
                for part in self.directory.glob("*.orbax-checkpoint-tmp"):
                    part.rmtree(missing_ok=True)
                self._manager.reload()  # what it wanted to remove, it has not removed
            raise OSError(
                f"a checkpoint could not be written to {self.directory}: {error}"
            ) from error

    def read(self, step: int, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The named trees with the shapes, dtypes and shardings of `like`, and the record.

        This uses Orbax's handlers. The manager would wait for all processes at the end, and for
        ever if one of them cannot read.
        """
        import orbax.checkpoint as ocp

        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        trees = {
            name: ocp.StandardCheckpointHandler().restore(
                self.directory / str(step) / name, args=ocp.args.StandardRestore(tree)
            )
            for name, tree in abstract.items()
        }
        return trees, self.record(step)

    def record(self, step: int) -> dict[str, Any]:
        """Read the record of a checkpoint without its arrays."""
        import orbax.checkpoint as ocp

        folder = self.directory / str(step) / "record"
        return ocp.JsonCheckpointHandler().restore(folder, args=ocp.args.JsonRestore())

    def newest(
        self, like: dict[str, Any], among: Sequence[int] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The newest checkpoint that all processes can read, of all or `among` these steps; damaged
        ones are passed over with a warning.

        Raises FileNotFoundError when there is none, ValueError when none can be read.
        """
        steps = self.steps() if among is None else among
        if not steps:
            raise FileNotFoundError(
                f"no checkpoint in {self.directory}: give the work directory of a run that has"
                " saved one"
            )
        problem: Exception | None = None
        for step in reversed(steps):
            found, failed = None, None
            try:
                found = self.read(step, like)
            except Exception as error:
                alone = jax.process_count() == 1
                if alone and "RESOURCE_EXHAUSTED" in str(error):  # no room, which is no damage
                    raise
                failed = error
            by_all = not sharding.allgather(np.array(failed is not None)).any()
            if found and by_all:
                return found
            failed = failed or OSError("another process of the run could not read its part")
            log.warning("checkpoint %s/%d cannot be read: %s", self.directory, step, failed)
            problem = problem or failed
        reasons = (self._other_settings(step, like) for step in reversed(steps))
        reason = next(
            filter(None, reasons),
            "Either they are damaged (restore them from a copy) or they belong to another model or"
            " LoRA (set lora.rank, lora.targets and model.path to the run's config.json)",
        )
        raise ValueError(
            f"none of the checkpoints {steps} in {self.directory} can be read. {reason}: {problem}"
        ) from problem

    def _other_settings(self, step: int, like: dict[str, Any]) -> str:
        """Say which settings a checkpoint was made with, if it has other arrays than `like` or they
        have other shapes; "" if it has the same, or if its shapes cannot be read."""
        import orbax.checkpoint as ocp

        folder, read = self.directory / str(step), ocp.StandardCheckpointHandler().metadata
        try:
            stored, record = {name: read(folder / name).tree for name in like}, self.record(step)
        except Exception:  # damaged, as the caller says
            return ""
        other = [part for part in SHAPING if _shapes(like, part) != _shapes(stored, part)]
        if not other:
            return ""
        return (
            f"{other[0]} has other arrays, or other shapes, than the config asks for. It was"
            f" trained with {shaping(record, other[0])}: set what differs to these values. Training"
            " with other ones needs a new --workdir"
        )

    def save(self, epoch: int, state: TrainState, record: dict[str, Any]) -> None:
        """Save the training state after `epoch` epochs."""
        self.write(epoch, _parts(state), record)

    def resume(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read the newest readable training state, and its record."""
        trees, record = self.newest(_parts(like))
        state = trees["state"]
        return dataclasses.replace(state, copies={**state.copies, "ema": trees["ema"]}), record

    def keep_only(self, step: int) -> None:
        """Remove all checkpoints but that of `step`, newer ones too."""
        for other in self.steps():
            if other != step:
                with self._complete():
                    self._manager.delete(other)

    def wait(self) -> None:
        """Wait until all is written. Raises OSError if the last checkpoint could not be."""
        with self._complete():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _parts(state: TrainState) -> dict[str, Any]:
    """Split a state into separately written parts, because evaluation reads the EMA alone."""
    copies = {name: copy for name, copy in state.copies.items() if name != "ema"}
    return {"state": dataclasses.replace(state, copies=copies), "ema": state.copies["ema"]}


def _shapes(trees: dict[str, Any], part: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays in a part of a checkpoint, by their paths."""
    named = (
        (jax.tree_util.keystr(path, simple=True, separator="/"), tuple(x.shape))
        for path, x in jax.tree_util.tree_leaves_with_path(trees)
    )
    return {name: shape for name, shape in named if name.startswith(f"{part}/")}
