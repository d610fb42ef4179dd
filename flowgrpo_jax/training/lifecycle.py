"""The life cycle of a training run: its progress on the terminal, and saving when it ends early."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from flowgrpo_jax.checkpoints.run_checkpoints import RunCheckpoints
from flowgrpo_jax.command_line import cli
from flowgrpo_jax.types import TrainState

log = logging.getLogger(__name__)


class RunFailed(RuntimeError):
    """The run cannot go on. All processes of a run find this alike, in the same epoch."""


def count_lost(lost: int, skipped: float, most: int) -> int:
    """Count the epochs in a row that had no finite gradient at all.

    Args:
      lost: the count before this epoch.
      skipped: the share of this epoch's optimiser steps that were skipped, 0 to 1.
      most: the highest count with which a run goes on.

    Raises RunFailed when the new count is higher than `most`.
    """
    lost = lost + 1 if skipped > 1 - 1e-6 else 0
    if lost > most:
        raise RunFailed(
            f"no optimiser step of the last {lost} epochs had a finite gradient, more than"
            f" train.max_skipped={most}: resume with a lower train.learning_rate or in float32, if"
            " need be from an earlier checkpoint, by deleting the newest ones in checkpoints/"
        )
    return lost


def check_failed(epoch: int, failed: float, broken: float, *, most: float) -> None:
    """Raise RunFailed when too many of an epoch's images have no reward.

    Args:
      failed: share of the images without a reward; broken: share that is not finite.
      most: the largest share without a reward with which a run goes on.
    """
    if failed <= most:
        return
    cause = "see the warnings above"
    if broken > 0:
        cause = (
            f"{broken:.0%} of the pictures have pixels that are not finite, so the policy has"
            " diverged: resume from an earlier checkpoint with a lower train.learning_rate, or in"
            " float32"
        )
    raise RunFailed(
        f"the reward failed on {failed:.0%} of epoch {epoch}'s images, more than"
        f" reward.max_failed={most:.0%}: {cause}"
    )


def offer_best(
    checkpoints: RunCheckpoints,
    epoch: int,
    state: TrainState,
    report: dict[str, float],
    *,
    reward: str,
    failed: float,
    broken: float,
    most_failed: float,
) -> None:
    """Keep the state if its evaluation is the best so far. One that failed in part cannot be.

    Args:
      report: the evaluation's figures; reward: the one that decides, "" if none does.
      failed: share of the images without that reward; broken: share not finite.
      most_failed: the largest share without it with which a state may be the best.
    """
    if broken:
        log.warning(
            "epoch %d: %.0f%% of the evaluated pictures have pixels that are not finite; the state"
            " cannot be the best",
            epoch,
            100 * broken,
        )
    elif failed <= most_failed:
        checkpoints.offer(epoch, state, report)
    else:
        log.warning(
            "epoch %d: %s failed on %.0f%% and cannot be the best", epoch, reward, 100 * failed
        )


def save_at_stop(checkpoints: RunCheckpoints, epoch: int, state: TrainState) -> None:
    """Save the state and wait until it is written.

    Raises OSError when that fails. A run of several processes ends with the exit status for a
    restart instead: whether there is room shows when they start again.
    """
    try:
        checkpoints.finish(epoch, state)
    except OSError as error:
        if jax.process_count() == 1:
            raise
        log.error("to be started again after this error", exc_info=error)
        raise SystemExit(cli.RESTART) from error


def save_at_error(
    error: Exception,
    checkpoints: RunCheckpoints,
    epoch: int,
    state: TrainState,
    *,
    began: int,
) -> None:
    """Save what was trained since the start, at epoch `began`; the caller raises the error again.

    If the state cannot be saved, the reason becomes a note of the error. Saving takes all
    processes, so that it is not tried when one of several has failed alone. Then the run ends with
    the exit status on which the launchers start it again: the cause may have been a lost peer or a
    disk that did not answer. (A run that fails again in its first epoch ends with the error.)
    """
    if epoch == began:
        return
    if isinstance(error, RunFailed) or jax.process_count() == 1:
        try:
            checkpoints.finish(epoch, state)
        except OSError as unsaved:
            error.add_note(str(unsaved))
    else:
        log.error("to be started again after this error", exc_info=error)
        raise SystemExit(cli.RESTART) from error


class Stages:
    """A clock of an epoch and its stages: `with stages("sample"): ...` adds to that stage."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}  # when each stage last began
        self._hidden = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._began[name] = begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def count_rewards(self, calls: Sequence[tuple[float, float]]) -> None:
        """Add the stage "rewards", by when each of their calls on the host began and ended."""
        self.seconds["rewards"] = sum(end - begun for begun, end in calls)
        waited = self._began.get("wait", math.inf)
        self._hidden = sum(max(min(end, waited) - begun, 0.0) for begun, end in calls)

    def figures(self) -> dict[str, float]:
        """Return the seconds since the start and of each stage.

        `hidden_rewards` is the share of the rewards' time on the host, summed over their threads,
        that had passed when the epoch began to wait for them.
        """
        figures = {f"seconds/{name}": seconds for name, seconds in self.seconds.items()}
        figures["seconds"] = time.perf_counter() - self.begun
        if rewards := self.seconds.get("rewards"):
            figures["hidden_rewards"] = self._hidden / rewards
        return figures


@contextmanager
def traced(directory: epath.Path, on: bool) -> Iterator[None]:
    """Write a trace of what the devices do inside to a directory, with `on`."""
    with jax.profiler.trace(str(directory)) if on else nullcontext():
        yield


class EpochBar(tqdm):
    """A progress bar whose rate and time left do not count the first epoch, which compiles."""

    first_seconds = 0.0  # that the first epoch took, with all before it

    def skip_first(self) -> None:
        """Advance the bar by the first epoch."""
        done = self.format_dict["n"] + 1
        self.n = self.initial = self.last_print_n = done
        self.last_print_t = time.time()
        self.first_seconds = self.last_print_t - self.start_t
        self.refresh()

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's figures; it asks for an overall rate by giving none, at the end of the run."""
        shown = super().format_dict
        done, seconds = shown["n"] - shown["initial"], shown["elapsed"] - self.first_seconds
        if shown["rate"] is None and done and seconds > 0:
            shown["rate"] = done / seconds
        return shown


def progress_bar(name: str, epoch: int, epochs: int, *, active: bool) -> EpochBar:
    """A bar of all epochs, `epoch` of which are done; nothing is shown unless `active`."""
    return EpochBar(
        total=epochs, initial=epoch, desc=name, unit="epoch", smoothing=0.1, disable=not active
    )


def show_epoch(
    bar: EpochBar, figures: dict[str, float], report: dict[str, float], *, first: bool
) -> None:
    """Advance the bar by an epoch, and write the evaluation before it in a line of its own.

    The first epoch of a start also compiles: the rate and the time left do not count it.
    """
    means = {k: v for k, v in report.items() if k.startswith("eval/") and k.count("/") == 1}
    scores = {k.removeprefix("eval/"): v for k, v in means.items()}
    if scores and not bar.disable:
        bar.write(
            f"epoch {bar.n}: held out  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
        )
    reward = f"reward {figures['reward']:.3f}"
    if first and not bar.disable:
        bar.set_postfix_str(reward, refresh=False)
        bar.skip_first()
    else:
        rate = f"{figures['images_per_second']:.0f} img/s"
        if "share_of_peak" in figures:
            rate += f", {figures['share_of_peak']:.0%} of peak"
        bar.set_postfix_str(f"{reward}, {rate}", refresh=False)
        bar.update()


def show_end(bar: EpochBar, epoch: int, last: dict[str, float]) -> None:
    """Close the bar and print the last evaluation, and how to go on after an early end."""
    shown = not bar.disable  # which closing sets
    bar.close()
    if not shown:
        return
    if last:
        means = {k: round(v, 4) for k, v in last.items() if k.startswith("eval/")}
        print(json.dumps({k: v for k, v in means.items() if math.isfinite(v)}))
    if epoch < bar.total:
        print(f"stopped after epoch {epoch}; go on with --resume")
