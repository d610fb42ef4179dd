"""The evaluations within a training run: of the EMA weights, on the same prompts and seeds."""

from __future__ import annotations

from etils import epath

from flowgrpo_jax import cli, logs
from flowgrpo_jax.evaluate import evaluate, figures_of, save_grid
from flowgrpo_jax.lifecycle import offer_best
from flowgrpo_jax.recipe import Recipe
from flowgrpo_jax.run_checkpoints import RunCheckpoints
from flowgrpo_jax.types import TrainState


def evaluate_into(
    workdir: epath.Path,
    run: Recipe,
    state: TrainState,
    epoch: int,
    checkpoints: RunCheckpoints,
    stop: cli.Stop,
) -> dict[str, float]:
    """Evaluate the EMA weights, leave a grid of the same prompts and seeds as always, and keep the
    state where it is the best so far."""
    result, images, batch = evaluate(run, state.copies["ema"], stop)
    with logs.warn_on_error("a sample grid"):
        file = workdir / "samples" / f"epoch-{epoch:05d}.png"
        save_grid(file, images, batch, run.config.eval.grid)
    report, best = figures_of(result), run.config.checkpoint.best
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
    return report
