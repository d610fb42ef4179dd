"""At an alarm of the monitors a run says so, stops, or raises the weight of its KL."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flowgrpo_jax import sharding
from flowgrpo_jax.assembly import parts
from flowgrpo_jax.assembly.run import Run, make_programs
from flowgrpo_jax.monitors import verdicts
from flowgrpo_jax.report import page
from flowgrpo_jax.storage import logs
from flowgrpo_jax.training.lifecycle import RunFailed
from flowgrpo_jax.training.run_output import RunOutput
from flowgrpo_jax.types import TrainState

log = logging.getLogger(__name__)
ALARMS = "monitor/alarms"  # the figure that counts an evaluation's alarms


def act_on_alarms(
    output: RunOutput, run: Run, state: TrainState, epoch: int, report: dict[str, float]
) -> None:
    """Warn of what the monitors find alarming, and do what `monitor.on_alarm` asks for.

    Raises RunFailed where that is to stop. The evaluation is then in the metrics and on the page.
    """
    found: list[verdicts.Verdict] = []
    with logs.warn_on_error("the verdicts of the monitors"):
        config = run.config
        found = judged(
            output.metrics, epoch, report, config.reward.weights, config.algorithm.options
        )
    words = verdicts.in_words(found)
    if words:
        log.warning("epoch %d: alarm: %s", epoch, words)
    count = sum(verdict.level == verdicts.ALARM for verdict in found)
    report[ALARMS] = sharding.from_first_process([count])[0]
    if run.config.monitor.on_alarm != "stop":
        return
    if not report[ALARMS]:
        output.checkpoints.keep_good(epoch, state)
        return
    output.write(epoch, {}, report)
    good, shown = output.workdir / "good", output.workdir / page.FILE
    raise RunFailed(
        f"the monitors raise an alarm at epoch {epoch}: {words or 'see the first process'}. The"
        f" last state without one is in {good}, and {shown} shows what changed: train again with a"
        " KL term or another reward, or go on in spite of it with --resume and"
        " --config.monitor.on_alarm=note"
    )


def raise_kl(run: Run, metrics: logs.Metrics, epoch: int, report: Mapping[str, float]) -> Run:
    """Return the run with the KL weight that its alarms so far ask for, where `monitor.on_alarm` is
    "raise_kl": twice as much for every evaluation with an alarm, from `monitor.kl_beta` on where
    there was none. It depends on the metrics alone, so that a resumed run has the same.

    Args:
      report: the figures of an evaluation at `epoch`, which are not in the metrics yet.
    """
    if run.config.monitor.on_alarm != "raise_kl":
        return run
    before = [row for row in logs.read(metrics.file) if row["epoch"] < epoch]
    here = sum(bool(row.get(ALARMS)) for row in [*before, report])
    times = sharding.from_first_process([here])[0]  # others may see the file later
    if not times:
        return run
    given = run.config.algorithm.options.kl_beta
    weight = given * 2**times if given else run.config.monitor.kl_beta * 2 ** (times - 1)
    log.warning("epoch %d: algorithm.options.kl_beta is %g after %d alarms", epoch, weight, times)
    return with_options(run, {"kl_beta": weight})


def judged(
    metrics: logs.Metrics,
    epoch: int,
    report: Mapping[str, float],
    weights: Mapping[str, float],
    options: Mapping[str, Any],
) -> list[verdicts.Verdict]:
    """Return the verdicts on an evaluation; none on the first one, or in another process than the
    one that writes the metrics."""
    if not metrics.active:
        return []
    before = [row for row in logs.read(metrics.file) if row["epoch"] < epoch]
    now = {"epoch": epoch, **logs.plain(report)}
    return verdicts.verdicts([*before, now], weights, options).get(epoch, [])


def with_options(run: Run, options: dict[str, Any]) -> Run:
    """Return the run with other options of its algorithm, which keeps the same copies and draws the
    same images. `config` stays as it was."""
    config = run.config.copy_and_resolve_references()
    config.algorithm.options.update(options)
    algorithm = parts.make_algorithm(config)
    judge = parts.make_judge(run.model, algorithm, run.scorer.trained)
    same = run.model, run.mesh, run.plan, run.setup
    made = make_programs(config, *same, algorithm, run.optimiser, judge=judge)
    changed = replace(run.programs, accumulate=made.accumulate, end_epoch=made.end_epoch)
    return replace(run, algorithm=algorithm, programs=changed)
