"""The policy step: the accumulated loss of an algorithm, then the optimiser, EMA and copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowgrpo_jax.algorithms import Algorithm, Figures, Score, Setup, Velocity
from flowgrpo_jax.types import Credit, Params, Rollout, TrainState

Carry = tuple[Params, Figures]  # the gradient and the figures of an update, so far
# Ends the name of a figure by step: its sum over images, and their number, at each step f32 [2, T]
BY_STEP = "_by_step"


def accumulate(
    algorithm: Algorithm,
    setup: Setup,
    velocity: Callable[..., jax.Array],
    policy: Params,
    others: Mapping[str, Params],
    rollout: Rollout,
    credit: Credit,
    terms: jax.Array,
    images: int,
    carry: Carry,
    score: Score | None = None,
) -> Carry:
    """Add one micro-batch's share to the gradient and figures of an update.

    Args:
      velocity: v(policy, x [M, H, W, C], sigma scalar or [M]) -> f32 [M, H, W, C].
      others: the policies that `algorithm.reads` names; no gradient reaches them.
      rollout: M images; terms: i32 [K].
      images: images of the whole update. The loss is the mean over images x K, however they are
        cut into micro-batches.
      score: the differentiable rewards, for an algorithm with `reward_gradient`.

    An image whose latents are not finite adds nothing (`without_broken`): one of them would make
    the whole gradient NaN, though its advantage is 0. A rollout with a tape must have none
    (`taped.usable`).

    Raises ValueError when the loss returns other figures than the algorithm names.
    """
    scale = 1.0 / (images * terms.shape[0])
    rollout, sound = without_broken(algorithm, setup, rollout)
    fixed = {name: partial(velocity, jax.lax.stop_gradient(p)) for name, p in others.items()}
    scores, tape = (score,) if score else (), rollout.tape
    trained = policy if tape is None else tape.velocity  # what the loss is differentiated by

    def own(trained: Any, term: jax.Array) -> Velocity:
        return partial(velocity, trained) if tape is None else lambda x, sigma: trained[term]

    def total(trained: Any, term: jax.Array) -> tuple[jax.Array, Figures]:
        views = {**fixed, "policy": own(trained, term)}
        loss, figures = algorithm.loss(setup, views, rollout, term, credit.of_term(term), *scores)
        if set(figures) != set(algorithm.figures):
            raise ValueError(
                f"the loss returns the figures {sorted(figures)}, and the algorithm names"
                f" {sorted(algorithm.figures)}: correct its `figures`"
            )
        loss, figures = jax.tree.map(lambda x: jnp.where(sound, x, 0.0), (loss, figures))
        return loss.sum(), figures

    def add(carry: tuple[Any, Figures], term: jax.Array) -> tuple[tuple[Any, Figures], None]:
        gradient, sums = carry
        (_, figures), grads = jax.value_and_grad(total, has_aux=True)(trained, term)
        gradient = jax.tree.map(lambda a, g: a + scale * g, gradient, grads)
        step = rollout.start + term
        return (gradient, _added(algorithm, sums, figures, scale, sound, step)), None

    if tape is None:
        return jax.lax.scan(add, carry, terms)[0]
    gradient, sums = carry
    (by_velocity, sums), _ = jax.lax.scan(add, (jnp.zeros_like(tape.velocity), sums), terms)
    (grads,) = tape.pullback(by_velocity)
    return jax.tree.map(jnp.add, gradient, grads), sums


def _added(
    algorithm: Algorithm,
    sums: Figures,
    figures: Figures,
    scale: float,
    sound: jax.Array,
    step: jax.Array,
) -> Figures:
    """Return the sums with a term's figures [M]: a mean, or the largest value of `worst`."""
    added = {
        name: jnp.maximum(sums[name], value.max())
        if name in algorithm.worst
        else sums[name] + scale * value.sum()
        for name, value in figures.items()
    }
    for name in algorithm.by_step:
        here = jnp.stack([figures[name].sum(), sound.sum()])
        added[name + BY_STEP] = sums[name + BY_STEP].at[:, step].add(here)
    return added


def without_broken(
    algorithm: Algorithm, setup: Setup, rollout: Rollout
) -> tuple[Rollout, jax.Array]:
    """Return a rollout with 0 in place of latents that are not finite, and which of its images
    count, bool [M].

    With an image that is not finite its whole group is left out where the loss compares the images
    of a group. Where it compares those of an update nothing is left out, and `apply_gradient` skips
    the update. A loss that is masked afterwards alone would still have a gradient of NaN.
    """
    finite = jax.tree.map(jnp.isfinite, (rollout.latents, rollout.x))
    sound = finite[0].all((1, 2, 3)) & finite[1].all((0, 2, 3, 4))
    if algorithm.whole == "update":
        return rollout, jnp.ones_like(sound)
    if algorithm.whole == "group":
        sound = jnp.repeat(sound.reshape(-1, setup.group_size).all(1), setup.group_size)
    return replace(
        rollout,
        latents=jnp.where(finite[0], rollout.latents, 0.0),
        x=jnp.where(finite[1], rollout.x, 0.0),
        log_prob=jnp.where(sound, rollout.log_prob, 0.0),
    ), sound


def add_matching(
    velocity: Callable[..., jax.Array],
    policy: Params,
    pairs: tuple[jax.Array, jax.Array],
    levels: jax.Array,
    scale: float,
    weight: float,
    carry: tuple[Params, jax.Array],
) -> tuple[Params, jax.Array]:
    """Add weight x scale x the sum over images and levels of |v - (noise - x_0)|^2 to a gradient.

    Args:
      velocity: v(policy, x [M, H, W, C], sigma scalar) -> f32 [M, H, W, C].
      pairs: x_0 and noise, f32 [M, H, W, C]; levels: sigmas f32 [K].
      carry: the gradient, and the sum without its weight, so far.
    """
    x_0, noise = pairs

    def loss(policy: Params, sigma: jax.Array) -> jax.Array:
        miss = velocity(policy, (1 - sigma) * x_0 + sigma * noise, sigma) - (noise - x_0)
        return scale * jnp.square(miss).mean((1, 2, 3)).sum()

    def add(carry: tuple[Params, jax.Array], sigma: jax.Array) -> tuple[Any, None]:
        gradient, total = carry
        value, grads = jax.value_and_grad(loss)(policy, sigma)
        gradient = jax.tree.map(lambda a, g: a + weight * g, gradient, grads)
        return (gradient, total + value), None

    return jax.lax.scan(add, carry, levels)[0]


def empty(algorithm: Algorithm, setup: Setup, policy: Params) -> Carry:
    """Return the gradient and figures that `accumulate` starts from."""
    by_step = {name + BY_STEP: jnp.zeros((2, setup.process.steps)) for name in algorithm.by_step}
    figures = {name: jnp.zeros(()) for name in algorithm.figures}
    return jax.tree.map(jnp.zeros_like, policy), figures | by_step


def epoch_figures(algorithm: Algorithm, each_step: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return an epoch's figures from those of its optimiser steps: their means.

    Of `algorithm.worst` the first step alone counts, because only before it is the policy the one
    that drew the images.
    """
    first = {name: each_step[0][name] for name in algorithm.worst}
    means = {
        name: sum(np.asarray(figures[name], float) / len(each_step) for figures in each_step)
        for name in each_step[0]
        if name not in first
    }
    return scalars(first | means)


def scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return an epoch's figures as numbers; those by step as their mean at each step that has
    images, "NAME/STEP" with two digits."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if not name.endswith(BY_STEP):
            found[name] = float(value)
            continue
        for step in np.flatnonzero(value[1]):
            sums, images = value[:, step]
            found[f"{name.removesuffix(BY_STEP)}/{step:02}"] = float(sums / images)
    return found


@lru_cache(maxsize=32)  # programs of the same optimiser are then the same as well
def optimiser(
    learning_rate: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    max_grad_norm: float = 1.0,
    warmup_steps: int = 0,
    decay_steps: int = 0,
) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm.

    The learning rate rises linearly over `warmup_steps`, if any, and after `decay_steps`, if any,
    falls as the inverse square root of the step. It does not depend on how long the run will be,
    so a run that is prolonged goes on as if it had been that long from the start.
    """

    def schedule(step: Any) -> Any:
        rise = jnp.minimum(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        fall = jnp.sqrt(decay_steps / jnp.maximum(step, decay_steps)) if decay_steps else 1.0
        return learning_rate * rise * fall

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(
            schedule,  # also a constant one: the state has the same parts with every setting
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
        ),
    )


def init(
    policy: Params,
    copies: Mapping[str, Any],
    memory: Mapping[str, Any],
    tx: optax.GradientTransformation,
    key: jax.Array,
) -> TrainState:
    """Return the state before the first step.

    Args:
      copies: names of the copies that the algorithm keeps beside the EMA.
      memory: what the advantages remember; key: the run's root key.
    """
    started = {name: jax.tree.map(jnp.copy, policy) for name in ("ema", *copies)}
    return TrainState(jnp.int32(0), policy, started, tx.init(policy), dict(memory), key)


def blend(slow: Params, policy: Params, decay: Any) -> Params:
    """Return decay x slow + (1 - decay) x policy."""
    return jax.tree.map(lambda s, p: s * decay + p * (1 - decay), slow, policy)


def apply_gradient(
    state: TrainState, gradient: Params, tx: optax.GradientTransformation, ema_decay: float
) -> tuple[TrainState, Figures]:
    """Take one optimiser step and one EMA step. A gradient that is not finite changes nothing.

    EMA decay is min((1 + n) / (10 + n), ema_decay) at optimiser step n, once per optimiser step;
    upstream steps it per micro-batch, so that its horizon depends on the batch layout.
    """

    def step(state: TrainState) -> TrainState:
        updates, opt_state = tx.update(gradient, state.opt_state, state.policy)
        policy = optax.apply_updates(state.policy, updates)
        decay = jnp.minimum((1 + state.step) / (10 + state.step), ema_decay)
        copies = {**state.copies, "ema": blend(state.copies["ema"], policy, decay)}
        return replace(
            state, step=state.step + 1, policy=policy, copies=copies, opt_state=opt_state
        )

    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm)
    state = jax.lax.cond(finite, step, lambda unchanged: unchanged, state)
    return state, {"grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}


def end_epoch(state: TrainState, begun: jax.Array, algorithm: Algorithm) -> TrainState:
    """Move the algorithm's copies, once the updates of an epoch are done.

    Args:
      begun: i32, the optimiser steps that had been taken when the epoch began.
    """
    moved = {
        name: blend(state.copies[name], state.policy, decay(begun, state.step))
        for name, decay in algorithm.copies.items()
    }
    return replace(state, copies={**state.copies, **moved})
