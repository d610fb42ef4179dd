"""The evaluations within a training run: of the EMA weights, on the same prompts and seeds.

Here a run also leaves what its page shows: pictures with their scores, and monitors.
"""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flowgrpo_jax import sharding
from flowgrpo_jax.assembly import parts, settings
from flowgrpo_jax.assembly.run import Run
from flowgrpo_jax.command_line.stop import Stop
from flowgrpo_jax.evaluate import draw, draw_balanced, figures_of, save_grid, summarise
from flowgrpo_jax.monitors import embedding, move, picture_figures, true_loss
from flowgrpo_jax.report import pictures
from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.scoring.reward_weights import RewardWeights
from flowgrpo_jax.scoring.scorer import Scorer
from flowgrpo_jax.scoring.scores import Scores
from flowgrpo_jax.storage import logs, picture_grid
from flowgrpo_jax.training.alarms import act_on_alarms
from flowgrpo_jax.training.lifecycle import offer_best
from flowgrpo_jax.training.run_output import RunOutput
from flowgrpo_jax.types import Credit, PromptBatch, TrainState

PROMPTS, REPEATS = 6, 4  # whose pictures tell the diversity, where the evaluation repeats none
SHEET = "samples"  # the name of an evaluation's pictures in TensorBoard and Weights & Biases


def evaluate_into(
    output: RunOutput, run: Run, state: TrainState, epoch: int, stop: Stop
) -> dict[str, float]:
    """Evaluate the EMA weights, leave pictures of the same prompts and seeds as always, and keep
    the state where it is the best so far. Returns the figures.

    Raises RunFailed at an alarm of the monitors where `monitor.on_alarm` is "stop".
    """
    begun = time.perf_counter()
    batch, pixels, scores = draw_balanced(run, state.copies["ema"], stop)
    result = summarise(batch, scores)
    show(output, epoch, batch, pixels, scores, run.config.eval.grid)
    report, best = figures_of(result), run.config.checkpoint.best
    report |= monitored(run, state, batch, pixels, stop)
    report["eval_seconds"] = time.perf_counter() - begun
    act_on_alarms(output, run, state, epoch, report)
    offer_best(
        output.checkpoints,
        epoch,
        state,
        report,
        reward=best,
        failed=result["failures"].get(best, 0.0),
        broken=result["broken"],
        most_failed=run.config.reward.max_failed,
    )
    return report


def show(
    output: RunOutput,
    epoch: int,
    batch: PromptBatch,
    pixels: np.ndarray,
    scores: Scores,
    n: int,
) -> None:
    """Leave the first `n` pictures of an evaluation where people look."""
    with logs.warn_on_error("a sample grid"):
        save_grid(output.workdir / "samples" / f"epoch-{epoch:05d}.png", pixels, batch, n)
        output.metrics.show(epoch, SHEET, lambda: picture_grid.grid(pixels[:n], batch.prompts[:n]))
    with logs.warn_on_error("the pictures of the run's page"):
        pictures.save_evaluation(output.workdir, epoch, pixels, batch, scores, n)


def monitored(
    run: Run, state: TrainState, batch: PromptBatch, pixels: np.ndarray, stop: Stop
) -> dict[str, float]:
    """Return the monitors' figures of an evaluation with its pictures, uint8 [n, H, W, 3]."""
    found: dict[str, float] = {}
    with logs.warn_on_error("the statistics of the evaluated pictures"):
        found |= picture_figures.statistics(pixels)
    policy, ids = state.copies["ema"], batch.ids
    if run.config.monitor.move and has_reference(run):
        found |= moved(run, state, batch)
    if run.config.monitor.pictures:
        found["true_loss"] = true_pictures_loss(run, state)
    if len(np.unique(ids)) > len(ids) - PROMPTS:  # hardly any prompt has two pictures
        again, repeats = repeated(batch, min(PROMPTS, len(ids)))
        unscored = Scorer(RewardWeights({}), {}, run.test_prompts, run.mesh)
        drawing = dataclasses.replace(run, test_scorer=unscored)
        pixels, _ = draw(drawing, policy, again, repeats, stop, False)
        ids = again.ids
    with logs.warn_on_error("the diversity of the evaluated pictures"):
        found["diversity"] = picture_figures.diversity(pixels, ids)
    if tower := embedding.find((run.test_scorer.in_graph, run.scorer.in_graph)):
        vectors = embedding.embeddings(*tower, pixels, run.mesh, at_once(run))
        found["clip_diversity"] = embedding.diversity(vectors, ids)
    return {f"monitor/{name}": value for name, value in found.items()}


def has_reference(run: Run) -> bool:
    """Whether the base model is still there: full fine-tuning without a KL gives its weights up."""
    return bool(run.model.lora_spec.rank) or set(run.model.trained_shapes) <= set(run.model.base)


def at_once(run: Run) -> int:
    """Return how many pictures the monitors' programs handle at once: few, and a share each for the
    devices."""
    micro = run.config.eval.micro_batch or run.plan.micro_batch
    shards = sharding.row_shards(run.mesh)
    return min(-(-move.IMAGES // shards) * shards, micro)


def moved(run: Run, state: TrainState, batch: PromptBatch) -> dict[str, float]:
    """Return how far the EMA weights have moved from the base model, by noise level."""
    config, model = run.config, run.model
    rows = np.arange(at_once(run), dtype=np.int32)
    chosen = rows % len(batch.ids)
    cond = run.encode([batch.prompts[i] for i in chosen])
    keys = keys_of(run, batch.ids[chosen], rows)
    scale = settings.guidance(config.eval.guidance_scale, "eval.guidance_scale", model.guidance)
    sigmas = parts.sigmas(model, config, move.STEPS)
    measure = move.program(
        sampler.guided(model.velocity, scale, model.guidance),
        run.mesh,
        model.latent_shape(config.model.height, config.model.width),
        sigmas,
    )
    base = model.reference(state.policy)  # a run may move its own reference
    rows, keys = sharding.split_rows(run.mesh, (rows, keys))
    found = measure(state.copies["ema"], base, model.base, cond, run.empty, rows, keys)
    return move.figures(sharding.to_host(found), sigmas)


def true_pictures_loss(run: Run, state: TrainState) -> float:
    """Return the flow-matching loss of the EMA weights on `monitor.pictures`."""
    config, model, size = run.config, run.model, at_once(run)
    if model.to_latents is None:
        return float("nan")
    shown, texts = true_loss.load(config.monitor.pictures, config.model.height, config.model.width)
    unguided = sampler.guided(model.velocity, 1.0, model.guidance)
    measure = true_loss.program(unguided, model.to_latents, run.mesh)
    policy, losses = state.copies["ema"], []
    for begin in range(0, len(shown), size):
        rows = np.arange(begin, begin + size, dtype=np.int32) % len(shown)  # static shapes
        cond = run.encode([texts[i] for i in rows])
        keys = keys_of(run, np.zeros(size, np.int32), rows)
        places = np.arange(size, dtype=np.int32)
        pixels, places, keys = sharding.split_rows(run.mesh, (shown[rows], places, keys))
        vae = run.weights["vae"]
        found = measure(policy, model.base, vae, pixels, cond, run.empty, places, keys)
        losses.append(sharding.to_host(found)[: len(shown) - begin])
    return float(np.concatenate(losses).mean())


def keys_of(run: Run, ids: np.ndarray, images: np.ndarray) -> jax.Array:
    """Image keys of the evaluation's seed; ids, images: i32 [M]."""
    key = jax.random.key(run.config.eval.seed)
    return sampler.image_keys(key, 0, jnp.asarray(ids), jnp.asarray(images))


def repeated(batch: PromptBatch, n: int) -> tuple[PromptBatch, np.ndarray]:
    """REPEATS pictures of each of the first `n` prompts, and each one's repetition i32."""
    rows = np.repeat(np.arange(n), REPEATS)
    chosen = [batch.metadata[i] for i in rows]
    again = PromptBatch([batch.prompts[i] for i in rows], chosen, batch.ids[rows])
    return again, np.tile(np.arange(REPEATS, dtype=np.int32), n)


def show_training(
    workdir: epath.Path,
    epoch: int,
    batch: PromptBatch,
    group_size: int,
    scores: Scores,
    credit: Credit,
) -> None:
    """Leave some of an epoch's images, with their scores and advantages, for the run's page."""
    with logs.warn_on_error("the training pictures of the run's page"):
        advantage = np.atleast_2d(np.asarray(credit.advantage))
        pictures.save_training(workdir, epoch, batch, group_size, scores, advantage)
