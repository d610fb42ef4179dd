"""Checkpoints of everything that a resumed run needs, through Orbax."""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from flowgrpo_jax import files, sharding
from flowgrpo_jax.models.base_model import BaseModel
from flowgrpo_jax.run_record import same_base, same_settings
from flowgrpo_jax.types import TrainState

log = logging.getLogger(__name__)
FOLDERS = ("checkpoints", "best")  # of a work directory
FORMAT = 2  # of a training state; 1 had the fields lora and ema in place of policy and copies
LIBRARIES = ("flowgrpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Checkpoints:
    """The checkpoints of one run by step: named trees of arrays and a JSON record each.

    Args:
      keep: the last ones of them; all without it.
      own: of the run that writes them, which removes what a killed one left half-written. Others
        may read beside it.
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

        By Orbax's handlers, where the manager would wait for all processes at the end: those that
        can read it for ever, if one cannot.
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
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
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
        raise ValueError(
            f"none of the checkpoints {steps} in {self.directory} can be read. Either they are"
            " damaged (restore them from a copy) or they belong to another model or LoRA (set"
            f" lora.rank, lora.targets and model.path to the run's config.json): {problem}"
        ) from problem

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


def rescue(epoch: int, state: TrainState, record: dict[str, Any], error: OSError) -> OSError:
    """Write the state to a temporary directory; `error`, which kept it from its place, with the way
    back. For one process: several have no directory in common but the one that failed."""
    if jax.process_count() > 1:
        return error
    spare = Checkpoints(epath.Path(tempfile.mkdtemp()) / "checkpoints")
    spare.save(epoch, state, record)
    spare.close()
    return OSError(
        f"{error}. The state after epoch {epoch} is in {spare.directory}: make room, move its"
        f" folder {epoch} into the run's checkpoints, and go on with --resume"
    )


class Best:
    """The checkpoint with the highest value of an evaluated reward, in a directory of its own."""

    def __init__(
        self,
        directory: epath.PathLike,
        reward: str,
        config: dict[str, Any],
        base: BaseModel,
    ):
        self.config, self.base = config, base
        # Not the newest one: a run may have gone on from a checkpoint before it.
        self.checkpoints = Checkpoints(directory, own=True)
        self.figure = f"eval/{reward}"
        # As the first process reads it: all must agree on when to save.
        self.value = float(sharding.allgather(np.array(self._stored(), np.float64))[0])

    def _stored(self) -> float:
        value = -math.inf
        for step in self.checkpoints.steps():
            try:
                value = max(value, float(self.checkpoints.record(step)[self.figure]))
            except Exception as error:  # another reward's, or damaged: the next one replaces it
                log.warning("%s/%d is passed over: %s", self.checkpoints.directory, step, error)
        return value

    def offer(self, epoch: int, state: TrainState, report: dict[str, float]) -> None:
        """Keep the state after `epoch` epochs if its evaluation is the best so far.

        If it cannot be written, that is a warning; with several processes it raises OSError.
        """
        value = report[self.figure]
        if not value > self.value:
            return
        try:
            record = {"epoch": epoch, "config": self.config, "base": self.base.mark}
            self.checkpoints.save(epoch, state, record | {self.figure: value})
            self.checkpoints.wait()
            self.checkpoints.keep_only(epoch)
            self.value = value
        except OSError as error:
            if jax.process_count() > 1:
                raise
            log.warning("%s; training goes on", error)


def versions() -> dict[str, str]:
    """Return the versions and the devices on which the bits of a run depend."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    found = {"devices": devices, "python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):  # ours, where it was not installed
            found[name] = metadata.version(name)
    return found


class RunCheckpoints:
    """The checkpoints in a run's work directory: its last states and, on request, its best one.

    Args:
      config: the resolved one, kept with every state.
      base: the model that is trained, which a resumed run must have started from.
      best: a reward's name, or "": the state with its highest value in evaluation is kept.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: dict[str, Any],
        base: BaseModel,
        *,
        keep: int | None,
        best: str,
    ):
        self.config, self.base = config, base
        self.last = Checkpoints(workdir / "checkpoints", keep=keep, own=True)
        self.best = Best(workdir / "best", best, config, base) if best else None
        self.saved = -1  # epochs that the newest state has behind it
        self.lost = 0  # epochs in a row without a finite gradient

    def resume(self, like: TrainState) -> tuple[TrainState, int]:
        """The newest state and its epoch, or `like` and 0: launchers always resume, and the first
        time there is nothing yet."""
        if not self.last.steps():
            log.warning("no checkpoint in %s: starting from epoch 0", self.last.directory)
            return like, 0
        self._check_format()
        state, record = self.last.resume(like)
        same_base(record, self.base, self.last.directory)
        same_settings(record, self.config, ("seed",), self.last.directory)
        same_settings(record, self.config, ("lora", "alpha"), self.last.directory)
        self.saved, self.lost = int(record["epoch"]), int(record.get("lost", 0))
        then, now = record.get("versions", {}), versions()
        changed = [
            f"{name} {then[name]} -> {now.get(name)}"
            for name in then
            if then[name] != now.get(name)
        ]
        if changed:
            log.warning(
                "the run was saved with other libraries or devices (%s): it goes on, but not bit"
                " for bit",
                ", ".join(changed),
            )
        return state, self.saved

    def _check_format(self) -> None:
        """Raise ValueError, before any state is read, for those that cannot be read as they are."""
        try:
            record = self.last.record(self.last.steps()[-1])
        except Exception:  # damaged: `newest` passes over it, and says so
            return
        if (found := record.get("format", 1)) != FORMAT:
            raise ValueError(
                f"{self.last.directory} was written by another version of flowgrpo_jax: its states"
                f" have format {found}, and this version trains on from format {FORMAT}. Evaluate"
                " or export it as it is, or start a new run in another --workdir"
            )
        same_settings(record, self.config, ("algorithm", "name"), self.last.directory)
        same_settings(record, self.config, ("advantage", "name"), self.last.directory)

    def save(self, epoch: int, state: TrainState) -> None:
        """Save the state after `epoch` epochs, and log a warning if it cannot be written.

        In a run of several processes this raises OSError instead, because some of them may not
        know of the failure; the run is then started again.
        """
        try:
            self._save(epoch, state)
        except OSError as error:
            if jax.process_count() > 1:
                raise
            log.warning("%s; training goes on", error)

    def finish(self, epoch: int, state: TrainState) -> None:
        """Save and wait. Raises OSError, once the state has been rescued to another place."""
        try:
            self._save(epoch, state)
            self.last.wait()  # a second signal must not cut it short
        except OSError as error:
            self.saved = epoch  # do not try again
            raise rescue(epoch, state, self._record(epoch), error) from error

    def _save(self, epoch: int, state: TrainState) -> None:
        if self.saved != epoch:
            self.last.save(epoch, state, self._record(epoch))
        self.saved = epoch

    def _record(self, epoch: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "epoch": epoch,
            "lost": self.lost,
            "config": self.config,
            "base": self.base.mark,
            "versions": versions(),
        }

    def offer(self, epoch: int, state: TrainState, report: dict[str, float]) -> None:
        """Keep the state if its evaluation, `report`, is the best so far."""
        if self.best:
            self.best.offer(epoch, state, report)

    def close(self) -> None:
        self.last.close()
        if self.best:
            self.best.checkpoints.close()


def _parts(state: TrainState) -> dict[str, Any]:
    """Split a state into separately written parts, because evaluation reads the EMA alone."""
    copies = {name: copy for name, copy in state.copies.items() if name != "ema"}
    return {"state": dataclasses.replace(state, copies=copies), "ema": state.copies["ema"]}
