"""The policy step: replay the stored transitions, accumulate the gradient, update the adapter.

A micro-batch is replayed exactly as it was sampled (same images, same velocity function, latents in
f32), so before the first optimiser step of an epoch every ratio is 1 (`ratio_gap` says how nearly).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flowgrpo_jax import grpo, sde
from flowgrpo_jax.sampler import Process
from flowgrpo_jax.types import Params, TrainState, Trajectory


@dataclass(frozen=True)
class Objective:
    """What is minimised: a row of `grpo.LOSSES` plus `kl_beta` times the KL to the reference."""

    clip_range: float
    kl_beta: float = 0.0
    kl_weighting: str = "exact"
    loss: str = "clip"


# Per-transition figures that are averaged over an update; `ratio_gap` is the largest instead.
METRICS = ("policy_loss", "kl", "approx_kl", "clip_fraction")


def transition_loss(
    velocity: Callable[..., jax.Array],
    process: Process,
    objective: Objective,
    lora: Params,
    reference: Params,
    x: jax.Array,
    x_next: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed loss of one stored transition of M images, and its figures.

    Args:
      velocity: v(lora, x [M, H, W, C], sigma) -> f32 [M, H, W, C].
      reference: the adapter of the policy that the KL holds on to.
      x, x_next: f32 [M, H, W, C]; old_log_prob, advantage: f32 [M]; step: i32, its place in T.
    """
    sigmas = jnp.asarray(process.sigmas, jnp.float32)
    sigma, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
    new = process.transition(x, velocity(lora, x, sigma), step, x_next=x_next)
    loss, ratio = grpo.LOSSES[objective.loss](
        new.log_prob, old_log_prob, advantage, objective.clip_range
    )
    kl = jnp.zeros_like(loss)
    if objective.kl_beta:
        v_ref = jax.lax.stop_gradient(velocity(reference, x, sigma))
        ref = process.transition(x, v_ref, step, x_next=x_next)
        kl = sde.kl(
            new.mean,
            ref.mean,
            new.std,
            dt,
            weighting=objective.kl_weighting,
            reduction=process.reduction,
        )
    total = (loss + objective.kl_beta * kl).sum()
    figures = {
        "policy_loss": loss.sum(),
        "kl": kl.sum(),
        "approx_kl": 0.5 * jnp.square(new.log_prob - old_log_prob).sum(),
        "clip_fraction": (jnp.abs(ratio - 1) > objective.clip_range).sum().astype(jnp.float32),
        "ratio_gap": jnp.abs(ratio - 1).max(),
    }
    return total, figures


def accumulate(
    velocity: Callable[..., jax.Array],
    process: Process,
    objective: Objective,
    lora: Params,
    reference: Params,
    trajectory: Trajectory,
    advantage: jax.Array,
    start: jax.Array,
    trained: jax.Array,
    images: int,
    gradient: Params,
    figures: dict[str, jax.Array],
) -> tuple[Params, dict[str, jax.Array]]:
    """Add one micro-batch's share to the update's gradient and figures.

    Args:
      trajectory: M images; advantage: f32 [M].
      start: i32, the window's first step; trained: i32 [K], which of the window's steps to train.
      images: images of the whole update. The loss is the mean over images x K, however they are
        cut into micro-batches.
    """
    scale = 1.0 / (images * trained.shape[0])

    def body(carry: Any, i: jax.Array) -> tuple[Any, None]:
        total, sums = carry
        loss = jax.value_and_grad(transition_loss, argnums=3, has_aux=True)
        (_, new), grads = loss(
            velocity,
            process,
            objective,
            lora,
            reference,
            trajectory.x[i],
            trajectory.x[i + 1],
            trajectory.log_prob[i],
            advantage,
            start + i,
        )
        total = jax.tree.map(lambda a, g: a + scale * g, total, grads)
        means = {k: sums[k] + scale * new[k] for k in METRICS}
        gap = jnp.maximum(sums["ratio_gap"], new["ratio_gap"])
        return (total, {**means, "ratio_gap": gap}), None

    return jax.lax.scan(body, (gradient, figures), trained)[0]


def empty(lora: Params) -> tuple[Params, dict[str, jax.Array]]:
    """The gradient and figures that `accumulate` starts from."""
    figures = {k: jnp.zeros(()) for k in (*METRICS, "ratio_gap")}
    return jax.tree.map(jnp.zeros_like, lora), figures


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


def init(lora: Params, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step; `key` is the run's root key."""
    ema = jax.tree.map(jnp.copy, lora)
    return TrainState(jnp.int32(0), lora, ema, tx.init(lora), key)


def apply_gradient(
    state: TrainState, gradient: Params, tx: optax.GradientTransformation, ema_decay: float
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step and one EMA step. A gradient that is not finite changes nothing.

    EMA decay is min((1 + n) / (10 + n), ema_decay) at optimiser step n, once per optimiser step;
    upstream steps it per micro-batch, so that its horizon depends on the batch layout.
    """

    def step(state: TrainState) -> TrainState:
        updates, opt_state = tx.update(gradient, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        decay = jnp.minimum((1 + state.step) / (10 + state.step), ema_decay)
        ema = jax.tree.map(lambda e, p: e * decay + p * (1 - decay), state.ema, lora)
        return TrainState(state.step + 1, lora, ema, opt_state, state.key)

    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm)
    state = jax.lax.cond(finite, step, lambda unchanged: unchanged, state)
    return state, {"grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}
