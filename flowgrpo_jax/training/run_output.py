"""A training run writes checkpoints, metrics and a page to its work directory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import jax
from etils import epath

from flowgrpo_jax.assembly.run import Run
from flowgrpo_jax.checkpoints.run_checkpoints import RunCheckpoints
from flowgrpo_jax.command_line import cli
from flowgrpo_jax.models import base_model
from flowgrpo_jax.report import about, page
from flowgrpo_jax.storage import logs
from flowgrpo_jax.types import TrainState

log = logging.getLogger(__name__)


class RunOutput(NamedTuple):
    """The work directory of a run, with its checkpoints and its metrics."""

    workdir: epath.Path
    checkpoints: RunCheckpoints
    metrics: logs.Metrics

    def write(self, epoch: int, figures: Mapping[str, float], report: Mapping[str, float]) -> None:
        """Write the metrics of an epoch and, after an evaluation, the page.

        Args:
          report: the figures of the evaluation at that epoch, {} if there was none.
        """
        self.metrics.write(epoch, {**figures, **report})
        page.save(self.workdir, epoch, report)

    def close(self) -> None:
        """Wait until everything is written."""
        self.checkpoints.close()
        self.metrics.close()


def begin(
    run: Run, workdir: epath.Path, state: TrainState, *, resume: bool
) -> tuple[RunOutput, TrainState, int]:
    """Open the work directory and return its output, the state to begin with and its epoch: with
    `resume` those of the last checkpoint, if there is one.

    Args:
      state: the one before training.
    """
    config = run.config
    checkpoints = RunCheckpoints(
        workdir,
        config.to_dict(),
        base_model.of(run.model),
        keep=config.checkpoint.keep or None,
        best=config.checkpoint.best,
    )
    state, epoch = checkpoints.resume(state) if resume else (state, 0)
    if epoch > config.epochs:
        log.warning("%s has %d epochs, more than epochs=%d", workdir, epoch, config.epochs)
    cli.record(workdir, config)
    about.save(workdir, config.to_dict())
    first_process = jax.process_index() == 0
    metrics = logs.Metrics(
        workdir, epoch, config=config.to_dict(), active=first_process, **config.log
    )
    return RunOutput(workdir, checkpoints, metrics), state, epoch
