"""The credit of an epoch's images: their advantages, and the weights of their KL if it has any."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax import advantages, sharding
from flowgrpo_jax.advantages import diversity
from flowgrpo_jax.assembly.run import Run
from flowgrpo_jax.regularisation import kl_control
from flowgrpo_jax.scoring.scores import Scores
from flowgrpo_jax.types import Credit, Rollout, TrainState

KL = "kl"  # the part of the memory that belongs to the control of the KL


def initial(run: Run) -> dict[str, Any]:
    """Return the memory before the first epoch."""
    memory = run.advantage.initial(len(run.train_prompts))
    return {**memory, KL: _arrays(run.control.initial())} if run.control else memory


def rewards(scores: Scores) -> np.ndarray:
    """Return the weighted sum of each image's scores, f32 [B]; NaN where one of them failed."""
    total, valid = advantages.weighted(jnp.asarray(scores.values), jnp.asarray(scores.weights))
    return np.where(valid, total, np.nan)


def assign(
    run: Run,
    state: TrainState,
    scores: Scores,
    ids: np.ndarray,
    rollouts: Sequence[Rollout],
    pixels: np.ndarray,
) -> tuple[TrainState, Credit]:
    """Return the state with its new memory, and the credit of B images.

    Args:
      ids: i32 [P] of the prompts.
      rollouts: of each micro-batch; pixels: uint8 [B, H, W, 3], where the features read them.
    """
    own = {name: part for name, part in state.memory.items() if name != KL}
    paths = [_log_probs(rollouts)] if run.advantage.reads_log_prob else []
    values, weights = jnp.asarray(scores.values), jnp.asarray(scores.weights)
    advantage, memory = run.advantage.compute(own, values, weights, jnp.asarray(ids), *paths)
    if run.features:
        features = run.features(rollouts, pixels)
        clip = run.config.advantage.clip
        advantage = diversity.favour(advantage, features, group_size=run.plan.group_size, clip=clip)
    if unscored := run.algorithm.unscored:
        advantage = jnp.where(advantages.weighted(values, weights)[1], advantage, unscored)
    if run.control is None:
        return dataclasses.replace(state, memory=run.put(memory)), Credit(advantage)
    kl, held = run.control.weigh(_host(state), scores.values, scores.weights)
    state = dataclasses.replace(state, memory=run.put({**memory, KL: _arrays(held)}))
    return state, Credit(advantage, jnp.asarray(kl))


def cut(credit: Credit, parts: int) -> list[Credit]:
    """Cut a credit of B images into equal parts, on the host of every process."""
    leaves, shape = jax.tree.flatten(credit)
    cuts = [np.split(np.asarray(x), parts, axis=-1) for x in leaves]
    return [jax.tree.unflatten(shape, part) for part in zip(*cuts)]


def settle(
    run: Run, state: TrainState, figures: Mapping[str, float]
) -> tuple[TrainState, dict[str, float]]:
    """Update the KL's control with the KL that the epoch measured, and reset the reference where
    the control says so. Returns the state and further figures."""
    if run.control is None:
        return state, {}
    memory = run.control.settle(_host(state), figures["kl"])
    copies = state.copies
    if kl_control.must_reset(memory):
        copies = {**copies, "reference": jax.tree.map(jnp.copy, state.policy)}
    state = dataclasses.replace(
        state, copies=copies, memory=run.put({**state.memory, KL: _arrays(memory)})
    )
    return state, run.control.figures(memory)


def _log_probs(rollouts: Sequence[Rollout]) -> jax.Array:
    """Return the log-probs f32 [W, B] of the transitions of an epoch."""
    return jnp.asarray(np.concatenate([sharding.to_host(r.log_prob) for r in rollouts], axis=1))


def _host(state: TrainState) -> kl_control.Memory:
    return _arrays(state.memory[KL])


def _arrays(memory: kl_control.Memory) -> kl_control.Memory:
    return {name: np.asarray(value) for name, value in memory.items()}
