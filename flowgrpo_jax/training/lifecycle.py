"""When a training run has to stop, and what is saved then."""

from __future__ import annotations

import logging

import jax

from flowgrpo_jax.checkpoints.run_checkpoints import RunCheckpoints
from flowgrpo_jax.command_line import exit_status
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
        raise SystemExit(exit_status.RESTART) from error


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
        raise SystemExit(exit_status.RESTART) from error
