"""The evaluations within a training run: of the EMA weights, on the same prompts and seeds.

Here a run also leaves what its page shows: pictures with their scores, and monitors.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
from etils import epath

from flowgrpo_jax import cli, logs
from flowgrpo_jax.evaluate import draw, draw_balanced, figures_of, save_grid, summarise
from flowgrpo_jax.lifecycle import offer_best
from flowgrpo_jax.monitors import picture_figures
from flowgrpo_jax.recipe import Recipe
from flowgrpo_jax.report import pictures
from flowgrpo_jax.run_checkpoints import RunCheckpoints
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.scoring.scores import Scores
from flowgrpo_jax.types import Params, PromptBatch, TrainState

PROMPTS, REPEATS = 6, 4  # whose pictures tell the diversity, where the evaluation repeats none


def evaluate_into(
    workdir: epath.Path,
    run: Recipe,
    state: TrainState,
    epoch: int,
    checkpoints: RunCheckpoints,
    stop: cli.Stop,
) -> dict[str, float]:
    """Evaluate the EMA weights, leave pictures of the same prompts and seeds as always, and keep
    the state where it is the best so far. Returns the figures."""
    begun, policy = time.perf_counter(), state.copies["ema"]
    batch, pixels, scores = draw_balanced(run, policy, stop)
    result = summarise(batch, scores)
    with logs.warn_on_error("a sample grid"):
        file = workdir / "samples" / f"epoch-{epoch:05d}.png"
        save_grid(file, pixels, batch, run.config.eval.grid)
    with logs.warn_on_error("the pictures of the run's page"):
        pictures.save_evaluation(workdir, epoch, pixels, batch, scores, run.config.eval.grid)
    report, best = figures_of(result), run.config.checkpoint.best
    report |= monitored(run, policy, batch, pixels, stop)
    offer_best(
        checkpoints,
        epoch,
        state,
        report,
        reward=best,
        failed=result["failures"].get(best, 0.0),
        broken=result["broken"],
        most_failed=run.config.reward.max_failed,
    )
    return report | {"eval_seconds": time.perf_counter() - begun}


def monitored(
    run: Recipe, policy: Params, batch: PromptBatch, pixels: np.ndarray, stop: cli.Stop
) -> dict[str, float]:
    """Return the monitors' figures of an evaluation's pictures, uint8 [n, H, W, 3]."""
    found = picture_figures.statistics(pixels)
    ids = batch.ids
    if len(np.unique(ids)) > len(ids) - PROMPTS:  # hardly any prompt has two pictures
        batch, repeats = repeated(batch, min(PROMPTS, len(batch.ids)))
        unscored = Scorer(RewardWeights({}), {}, run.test_prompts, run.mesh)
        drawing = dataclasses.replace(run, test_scorer=unscored)
        pixels, _ = draw(drawing, policy, batch, repeats, stop, False)
        ids = batch.ids
    found["diversity"] = picture_figures.diversity(pixels, ids)
    return {f"monitor/{name}": value for name, value in found.items()}


def repeated(batch: PromptBatch, n: int) -> tuple[PromptBatch, np.ndarray]:
    """REPEATS pictures of each of the first `n` prompts, and each one's repetition i32."""
    rows = np.repeat(np.arange(n), REPEATS)
    chosen = [batch.metadata[i] for i in rows]
    again = PromptBatch([batch.prompts[i] for i in rows], chosen, batch.ids[rows])
    return again, np.tile(np.arange(REPEATS, dtype=np.int32), n)


def record_training(
    workdir: epath.Path,
    run: Recipe,
    epoch: int,
    batch: PromptBatch,
    scores: Scores,
    advantage: np.ndarray,
) -> None:
    """Leave some of an epoch's training pictures. Advantages: f32 [B] or, by step, [W, B]."""
    with logs.warn_on_error("the training pictures of the run's page"):
        size = run.plan.group_size
        pictures.save_training(workdir, epoch, batch, size, scores, np.atleast_2d(advantage))
