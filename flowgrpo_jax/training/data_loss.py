"""A loss on data beside the algorithm's: |v - (noise - x_0)|^2 of pictures that nobody rewards.

Sources: DDRL (arXiv 2512.04332, with the constants of cosmos-rl), which adds 0.01 times this loss
in place of a KL, on real pictures or on the base model's own samples; Pinterest's large-scale RL
(arXiv 2401.12244), whose pretraining loss has an optimiser step of its own.

As in DDRL the noise levels are those of the rollout's steps that the epoch trains, and the noise is
the initial noise of images of the update: those that lie evenly in it. Of several windows of an
epoch the first one counts. An algorithm without a window trains no steps; then as many levels as it
has terms are drawn from all steps.

The velocity is the policy's without guidance, as in pretraining; the base's own samples are drawn
without it too, so that at the start their gradient is 0 but for noise. Pictures become latents by
the mean of the autoencoder's posterior.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax import sharding
from flowgrpo_jax.assembly.run import Run
from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.types import Conditioning, Params, PromptBatch, Rollout, TrainState


@dataclass(frozen=True)
class EpochData:
    """The data of an epoch; without a loss on data there is none.

    Attributes:
      parts: of each update its micro-batches: (x_0 [M, H, W, C], prompt ids, places in the group,
        rows of `cond`, i32 [M]).
      levels: f32 [K].
      own_step: whether the optimiser takes a step for them alone; `parts` has one entry then.
    """

    parts: list[list[Any]] = field(default_factory=list)
    cond: Conditioning = field(default_factory=dict)
    levels: Any = None
    own_step: bool = False


def of_epoch(
    run: Run,
    state: TrainState,
    cond: Conditioning,
    batch: PromptBatch,
    rollouts: list[Rollout],
    epoch: int,
) -> EpochData:
    """Draw the pictures of an epoch.

    Args:
      cond: the conditioning of the prompts in `batch`.
    """
    data, plan = run.data, run.plan
    if data is None or not data.falls_on(epoch):
        return EpochData()
    updates = data.steps(plan.updates)
    size = plan.images // updates
    within = np.arange(data.images) * size // data.images
    images = (np.arange(updates)[:, None] * size + within).reshape(-1)
    groups, places = np.divmod(images.astype(np.int32), np.int32(plan.group_size))
    ids, rows = batch.ids[groups], groups
    if data.source is not None:
        captioned = data.source(len(images), run.config.seed, epoch)
        cond, rows = run.encode(captioned.captions), np.arange(len(images), dtype=np.int32)
        pixels = captioned.pixels()
    parts: list[list[Any]] = [[] for _ in range(updates)]
    for i in range(0, len(images), data.micro_batch):
        part = slice(i, i + data.micro_batch)
        drawn = sharding.split_rows(run.mesh, (ids[part], places[part], rows[part]))
        if data.source is not None:
            x_0 = run.programs.to_latents(
                run.model.params["vae"], sharding.split_rows(run.mesh, pixels[part])
            )
        else:
            base = run.model.reference(state.policy)
            x_0 = run.programs.draw_base(
                base, run.model.base, cond, run.empty, state.key, epoch, *drawn
            )
        parts[i // data.images].append((x_0, *drawn))
    levels = _levels(run, state, epoch, int(rollouts[0].start))
    return EpochData(parts, cond, levels, data.own_step)


def _levels(run: Run, state: TrainState, epoch: int, start: int) -> np.ndarray:
    """Return the noise levels of an epoch, f32 [K]."""
    process = run.setup.process
    key = sampler.epoch_key(state.key, epoch, sampler.TERMS_KEY)
    steps = np.asarray(run.algorithm.terms(run.setup, key)) + start
    if run.algorithm.records != "window":
        key = sampler.epoch_key(state.key, epoch, sampler.DATA_KEY)
        steps = np.asarray(jax.random.permutation(key, process.steps))[: len(steps)]
    return np.asarray(process.schedule(jnp.int32(start)))[steps]


def add(
    run: Run, data: EpochData, update: int, state: TrainState, epoch: int, gradient: Params
) -> tuple[Params, dict[str, jax.Array]]:
    """Add an update's data to its gradient, which is given up. Returns it, and the figure."""
    if not data.parts or data.own_step:
        return gradient, {}
    return _add(run, data, data.parts[update], state, epoch, gradient)


def step(
    run: Run, data: EpochData, state: TrainState, epoch: int
) -> tuple[TrainState, dict[str, float]]:
    """Take the optimiser step of the data alone, where it has one, after the updates. Returns the
    state and the figures, with whether the step was skipped because its gradient was not finite."""
    if not data.parts or not data.own_step:
        return state, {}
    gradient = run.put(jax.tree.map(jnp.zeros_like, state.policy))
    gradient, figures = _add(run, data, data.parts[0], state, epoch, gradient)
    state, applied = run.programs.apply(state, gradient)
    figures["data_skipped"] = applied["skipped"]
    return state, {name: float(value) for name, value in figures.items()}


def _add(
    run: Run, data: EpochData, parts: list[Any], state: TrainState, epoch: int, gradient: Params
) -> tuple[Params, dict[str, jax.Array]]:
    total = run.put(jnp.zeros(()))
    fixed = (run.model.base, data.cond, run.empty, state.key, epoch, data.levels)
    for part in parts:
        gradient, total = run.programs.add_data(gradient, total, state.policy, *fixed, *part)
    return gradient, {"data_loss": total}
