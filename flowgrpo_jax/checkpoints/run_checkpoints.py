"""The checkpoints of a training run: its last states, its best one, and what it resumes from."""

from __future__ import annotations

import logging
import math
import platform
import tempfile
from contextlib import suppress
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from flowgrpo_jax import sharding
from flowgrpo_jax.checkpoints.checkpoint import Checkpoints
from flowgrpo_jax.checkpoints.run_record import changed_settings, same_base, same_settings
from flowgrpo_jax.models.base_model import BaseModel
from flowgrpo_jax.monitors import verdicts
from flowgrpo_jax.types import TrainState

log = logging.getLogger(__name__)
FORMAT = 2  # of a training state; 1 had the fields lora and ema in place of policy and copies
LIBRARIES = ("flowgrpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def rescue(epoch: int, state: TrainState, record: dict[str, Any], error: OSError) -> OSError:
    """Write the state to a temporary directory, and return `error` with the way back from there.

    With several processes return `error` as it is: they share no other directory.
    """
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
    """The checkpoint with the best value of an evaluated reward, in a directory of its own: the
    highest one, or the lowest of a reward that should fall."""

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
        weight = config.get("reward", {}).get("weights", {}).get(reward, 0.0)
        self.sign = -1.0 if verdicts.lower_is_better(reward, weight) else 1.0
        # As the first process reads it: all must agree on when to save.
        self.value = float(sharding.allgather(np.array(self._stored(), np.float64))[0])

    def _stored(self) -> float:
        best = -math.inf
        for step in self.checkpoints.steps():
            try:
                value = float(self.checkpoints.record(step)[self.figure])
                best = max(best, self.sign * value)
            except Exception as error:  # another reward's, or damaged: the next one replaces it
                log.warning("%s/%d is passed over: %s", self.checkpoints.directory, step, error)
        return self.sign * best

    def offer(self, epoch: int, state: TrainState, report: dict[str, float]) -> None:
        """Keep the state after `epoch` epochs if its evaluation is the best so far.

        If it cannot be written, that is a warning; with several processes it raises OSError.
        """
        value = report[self.figure]
        if not self.sign * value > self.sign * self.value:
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
      best: a reward's name, or "": the state with its best value in evaluation is kept.
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
        self.good: Checkpoints | None = None  # where a state without an alarm was kept
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
        if settings := changed_settings(record, self.config):
            log.warning("the run goes on with other settings: %s", "; ".join(settings))
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

    def keep_good(self, epoch: int, state: TrainState) -> None:
        """Keep the state in good/, the last one whose evaluation raised no alarm. If it cannot be
        written, that is a warning; with several processes it raises OSError."""
        try:
            if self.good is None:
                self.good = Checkpoints(self.last.directory.parent / "good", own=True)
            self.good.save(epoch, state, self._record(epoch))
            self.good.wait()
            self.good.keep_only(epoch)
        except OSError as error:
            if jax.process_count() > 1:
                raise
            log.warning("%s; training goes on", error)

    def close(self) -> None:
        self.last.close()
        if self.good:
            self.good.close()
        if self.best:
            self.best.checkpoints.close()
