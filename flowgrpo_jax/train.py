"""Training by online reinforcement learning: read this file first.

    python -m flowgrpo_jax.train --config shapes --workdir runs/shapes [--resume]

An epoch: prompts -> a group of images for each, by the sampler -> rewards -> advantages -> policy
updates of the LoRA weights (with lora.rank=0, of all of the transformer's) by the loss of the
recipe's algorithm. Now and then: evaluation by the deterministic ODE, and a checkpoint.
"""

from __future__ import annotations

from flowgrpo_jax.compilation import huge_pages

if __name__ == "__main__":
    huge_pages.restart()  # before the imports below, which take seconds

import dataclasses
import itertools
import logging
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from flowgrpo_jax import update
from flowgrpo_jax.assembly import parts, settings
from flowgrpo_jax.assembly.run import Run, build_run, run_summary
from flowgrpo_jax.command_line import cli, connection, exit_status
from flowgrpo_jax.command_line.stop import Stop, Stopped
from flowgrpo_jax.costs import run_costs
from flowgrpo_jax.report import page
from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.scoring.pending import PendingScores
from flowgrpo_jax.scoring.scores import Scores, reward_figures
from flowgrpo_jax.training import credit, data_loss, gradient, lifecycle, progress, run_output
from flowgrpo_jax.training.alarms import raise_kl
from flowgrpo_jax.training.data_loss import EpochData
from flowgrpo_jax.training.run_evaluation import evaluate_into, show_training
from flowgrpo_jax.training.run_state import initial_state
from flowgrpo_jax.training.stages import Stages, traced
from flowgrpo_jax.types import Conditioning, Credit, PromptBatch, Rollout, TrainState

log = logging.getLogger(__name__)


def one_epoch(
    run: Run,
    state: TrainState,
    epoch: int,
    stop: Stop,
    page_dir: epath.Path | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Train for one epoch and return the new state and figures. A signal raises Stopped.

    Args:
      page_dir: the work directory, if some of the epoch's images are to be left for its page.
    """
    stages = Stages()

    # Prompts, encoded once each.
    with stages("encode"):
        batch = parts.draw_prompts(run.config, run.train_prompts, epoch)
        cond = run.encode(batch.prompts)

    # Rollouts, micro-batch by micro-batch; each is scored while the next one is drawn.
    rollouts, scores, pixels = draw(run, state, cond, batch, epoch, stop, stages)

    # Rewards, and the credit of each image: its advantage, and the weight of its KL.
    rewards = reward_figures(credit.rewards(scores), run.plan.group_size)
    most = run.config.reward.max_failed
    lifecycle.check_failed(epoch, rewards["failed"], scores.broken, most=most)
    state, assigned = credit.assign(run, state, scores, batch.ids, rollouts, pixels)
    if page_dir:
        show_training(page_dir, epoch, batch, run.plan.group_size, scores, assigned)

    # Policy updates, each on its own groups.
    data = data_loss.of_epoch(run, state, cond, batch, rollouts, epoch)
    with stages("update"):
        inputs = run.reward_inputs(batch.ids)
        state, figures = improve(run, state, cond, rollouts, assigned, inputs, data, epoch, stop)
    state, kl_figures = credit.settle(run, state, figures)
    figures |= kl_figures | rewards
    figures |= {f"reward/{name}": value for name, value in scores.means().items()}
    figures |= {"window_start": int(rollouts[0].start), "broken": scores.broken}
    return state, figures | stages.figures()


def draw(
    run: Run,
    state: TrainState,
    cond: Conditioning,
    batch: PromptBatch,
    epoch: int,
    stop: Stop,
    stages: Stages,
) -> tuple[list[Rollout], Scores, np.ndarray]:
    """Draw and score the epoch's images. Returns each micro-batch's rollout, the scores, and the
    pixels where the recipe looks at them."""
    policy = run.named_policy(state, run.algorithm.draws)
    windows = run.places(state.key, epoch)  # of the epoch's parts
    prepared = run.scorer.prepare(batch.ids)
    rollouts: list[Rollout] = []
    image_ids = np.repeat(batch.ids, run.plan.group_size)
    with PendingScores(run.scorer, image_ids, keep_pixels=run.keep_pixels) as pending:
        for m, images in enumerate(run.micro_batches(batch)):
            stop.check()
            start, tail = windows[run.plan.part(m)]
            with stages("sample"):
                rollout, pictures, scored = run.programs.sample(
                    policy, run.weights, cond, run.empty, state.key, epoch, start, *images, tail
                )
                jax.block_until_ready(rollouts[-1:])  # two at a time, or a stop would wait for all
            rollouts.append(rollout)
            pending.add(pictures, prepared, rollout.prompt, scored)
        with stages("sample"):
            jax.block_until_ready(rollouts[-1])
        with stages("wait"):
            scores = pending.collect(stop.wait)
        stages.count_rewards(pending.calls)
        return rollouts, scores, pending.pictures.pixels


def improve(
    run: Run,
    state: TrainState,
    cond: Conditioning,
    rollouts: list[Rollout],
    assigned: Credit,
    reward_inputs: dict[str, Any],
    data: EpochData,
    epoch: int,
    stop: Stop,
) -> tuple[TrainState, dict[str, float]]:
    """Take the epoch's policy updates, each on its own groups.

    Args:
      rollouts: of each micro-batch; assigned: the credit of B images.
      reward_inputs: what an algorithm that differentiates the rewards takes them from.
    """
    plan, algorithm = run.plan, run.algorithm
    terms = algorithm.terms(run.setup, sampler.epoch_key(state.key, epoch, sampler.TERMS_KEY))
    chunks = jnp.split(terms, len(terms)) if run.config.train.step_each_term else [terms]
    credits = credit.cut(assigned, plan.updates * plan.micro_batches)
    first_step = state.step
    each_step: list[dict[str, Any]] = []
    for number, chunk in itertools.product(range(plan.updates), chunks):
        summed, sums = gradient.of_update(
            run, state, cond, rollouts, credits, chunk, reward_inputs, number, stop.check
        )
        # Only before the first step is the policy the one that drew the images.
        if not each_step and (problem := algorithm.warning(update.scalars(sums))):
            log.warning("epoch %d: %s", epoch, problem)
        summed, on_data = data_loss.add(run, data, number, state, epoch, summed)
        state, step_figures = run.programs.apply(state, summed)
        state = run.put(state)  # as each micro-batch's gradient, in gradient.py
        each_step.append(sums | step_figures | on_data)
    figures = update.epoch_figures(algorithm, each_step)
    state, data_figures = data_loss.step(run, data, state, epoch)
    return run.programs.end_epoch(state, first_step), figures | data_figures


def train(
    config: ConfigDict, workdir: epath.PathLike, *, resume: bool = False, profile: int | None = None
) -> TrainState:
    """Train until `config.epochs`, and return the last state.

    Args:
      profile: an epoch of which a trace is written to `profile/` in the work directory.

    Raises SystemExit after Ctrl-C and SIGTERM, once the last whole epoch has been saved. Its code
    is 0 after Ctrl-C, and after SIGTERM `exit_status.RESTART`, on which the launchers start again.
    """
    workdir = epath.Path(workdir)  # a directory or, with gs:// and the like, a bucket
    cli.prepare(workdir, resume)
    run = build_run(config)
    flop = run_costs.flop_of_pass(run)
    if first_process := jax.process_index() == 0:
        print(run_summary(run), run_costs.line(run, flop), sep="\n")
        print(page.announced(workdir, config.eval.every))
    state = initial_state(run)
    run = dataclasses.replace(run, model=parts.drop_frozen(run.model, run.algorithm))
    output, state, epoch = run_output.begin(run, workdir, state, resume=resume)
    checkpoints = output.checkpoints
    bar = progress.progress_bar(config.name, epoch, config.epochs, active=first_process)
    every = config.eval.every if run.test_prompts else 0  # epochs between evaluations
    first, signal_number = epoch, 0
    last: dict[str, float] = {}  # the last evaluation's figures
    with Stop() as stop:
        try:
            while epoch < config.epochs:
                stop.check()
                report: dict[str, float] = {}
                if every and epoch % every == 0:
                    report = evaluate_into(output, run, state, epoch, stop)
                    page.save(workdir, epoch, report)
                if report or epoch == first:  # a resumed run has raised it before
                    run = raise_kl(run, output.metrics, epoch, report)
                page_dir = workdir if report else None
                with traced(workdir / "profile", epoch == profile):
                    trained, figures = one_epoch(run, state, epoch, stop, page_dir)
                checkpoints.lost = lifecycle.count_lost(
                    checkpoints.lost, figures["skipped"], config.train.max_skipped
                )
                state, epoch = trained, epoch + 1
                figures |= run_costs.speed(run, flop, epoch - 1, figures["seconds"])
                output.write(epoch - 1, figures, report)
                progress.show_epoch(bar, figures, report, first=epoch == first + 1)
                if epoch % config.checkpoint.every == 0:
                    checkpoints.save(epoch, state)
            checkpoints.finish(epoch, state)
            if every and epoch == config.epochs:
                last = evaluate_into(output, run, state, epoch, stop)
                output.write(epoch, {}, last)
        except Stopped as stopped:  # the epoch that it interrupts never happened
            signal_number = stopped.args[0]
            if epoch > first:
                lifecycle.save_at_stop(checkpoints, epoch, state)
        except Exception as error:
            lifecycle.save_at_error(error, checkpoints, epoch, state, began=first)
            output.metrics.close(failed=True)
            raise
        progress.show_end(bar, epoch, last)
        output.close()
        if signal_number:  # still within `stop`, where the signal's echo does not interrupt
            raise SystemExit(exit_status.RESTART if signal_number == signal.SIGTERM else 0)
    return state


def main(_: list[str]) -> None:
    with exit_status.exit_for_restart():
        connection.connect()
        config = cli.config()
        settings.split_cpu(config)
        workdir = flags.FLAGS.workdir or f"runs/{config.name}"
        with cli.compiling(workdir):
            train(config, workdir, resume=flags.FLAGS.resume, profile=flags.FLAGS.profile)


if __name__ == "__main__":
    cli.define_flags(config=True)
    cli.define_cache_flag()
    flags.DEFINE_string(
        "workdir", None, "The directory or bucket to write the run to; runs/NAME without it."
    )
    flags.DEFINE_bool("resume", False, "Go on from the last checkpoint in the work directory.")
    note = (
        "An epoch to write a trace of, for TensorBoard or Perfetto, to profile/ in the directory."
    )
    flags.DEFINE_integer("profile", None, note, lower_bound=0)
    cli.run(main)
