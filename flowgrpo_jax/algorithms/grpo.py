"""Flow-GRPO: the clipped ratio of recorded transitions, with a KL to the policy before training.

Source: Flow-GRPO (arXiv 2505.05470), equations 3 to 5.

A micro-batch is replayed exactly as it was sampled (the same images, the same velocity function,
latents in f32), so before the first optimiser step of an epoch every ratio is 1; the figure
`ratio_gap` is the largest distance from it.

Deviation from yifan123/flow_grpo: images whose group has no spread keep their place with advantage
0 in place of being filtered out, so that shapes, and with them the recorded log-probs, stay exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from flowgrpo_jax import sde
from flowgrpo_jax.algorithms import Algorithm, Figures, Setup, Velocities, advantage_of
from flowgrpo_jax.types import Rollout

STEP_CHOICES = ("random", "first")


def make(
    clip_range: float = 1e-4,
    kl_beta: float = 0.0,
    kl_weighting: str = "exact",
    steps: int = 0,
    step_choice: str = "random",
) -> Algorithm:
    """
    Args:
      clip_range: how far the ratio may move from 1. The ratio is the exponential of a mean over
        latent dimensions with `sample.reduction="mean"`, hence the small default.
      kl_beta: weight of the KL to the policy before training; 0 spares its forward pass.
      kl_weighting: "exact", or "no_dt" as upstream, which wants a beta ten times larger.
      steps: how many steps of the window an epoch trains; 0 means all.
      step_choice: which of them, "random" (drawn each epoch) or "first".
    """
    _check(clip_range, kl_beta, kl_weighting, steps, step_choice)

    def loss(
        setup: Setup,
        v: Velocities,
        rollout: Rollout,
        term: jax.Array,
        advantage: jax.Array,
    ) -> tuple[jax.Array, Figures]:
        process = setup.process
        sigmas = jnp.asarray(process.sigmas, jnp.float32)
        step, x, x_next = rollout.start + term, rollout.x[term], rollout.x[term + 1]
        sigma, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
        new = process.transition(x, v["policy"](x, sigma), step, x_next=x_next)
        change = new.log_prob - rollout.log_prob[term]
        value, ratio = clipped(change, advantage_of(advantage, term), clip_range)
        kl = jnp.zeros_like(value)
        if kl_beta:
            ref = process.transition(x, v["reference"](x, sigma), step, x_next=x_next)
            kl = sde.kl(
                new.mean,
                ref.mean,
                new.std,
                dt,
                weighting=kl_weighting,
                reduction=process.reduction,
            )
        figures = {
            "policy_loss": value,
            "kl": kl,
            "approx_kl": 0.5 * jnp.square(change),
            "clip_fraction": (jnp.abs(ratio - 1) > clip_range).astype(jnp.float32),
            "ratio_gap": jnp.abs(ratio - 1),
        }
        return value + kl_beta * kl, figures

    return Algorithm(
        loss,
        terms=partial(_terms, steps, step_choice),
        figures=("policy_loss", "kl", "approx_kl", "clip_fraction", "ratio_gap"),
        window=True,
        reads=("reference",) if kl_beta else (),
        worst=("ratio_gap",),
        warning=partial(_warning, clip_range),
        summary=f"{steps or 'all'} steps of the window, clip {clip_range:g}, KL {kl_beta:g}",
    )


def _terms(steps: int, step_choice: str, setup: Setup, key: jax.Array) -> jax.Array:
    """Return the transitions that an epoch trains, as places in the window."""
    size = setup.process.window
    if steps > size:
        raise ValueError(
            f"algorithm.options.steps={steps}: the window has {size} steps to train; choose 1"
            f" to {size}, or 0 for all of them"
        )
    if steps in (0, size) or step_choice == "first":
        return jnp.arange(steps or size)
    return jnp.sort(jax.random.permutation(key, size)[:steps])


def _warning(clip_range: float, figures: Mapping[str, float]) -> str:
    gap = figures["ratio_gap"]
    if gap <= clip_range:
        return ""
    return (
        f"ratio_gap {gap:.2g} exceeds clip_range {clip_range:.2g}: update and sampler disagree"
        " about the log-probs, and the clip cuts noise; use model.dtype='float32', or a larger"
        " clip_range"
    )


def _check(
    clip_range: float, kl_beta: float, kl_weighting: str, steps: int, step_choice: str
) -> None:
    if not clip_range > 0:
        raise ValueError(f"algorithm.options.clip_range={clip_range}: must be above 0")
    if not kl_beta >= 0:
        raise ValueError(f"algorithm.options.kl_beta={kl_beta}: must be at least 0")
    if steps < 0:
        raise ValueError(f"algorithm.options.steps={steps}: must be at least 0, which means all")
    for name, value, known in (
        ("kl_weighting", kl_weighting, sde.KL_WEIGHTINGS),
        ("step_choice", step_choice, STEP_CHOICES),
    ):
        if value not in known:
            choices = ", ".join(map(repr, known))
            raise ValueError(f"algorithm.options.{name}={value!r}: choose from {choices}")


def clipped(
    log_ratio: jax.Array, advantage: jax.Array, clip_range: float
) -> tuple[jax.Array, jax.Array]:
    """Return (loss [M], ratio r [M]) of max(-A r, -A clip(r, 1 - c, 1 + c)), r = exp(log_ratio).

    Beyond e^20 the ratio is a constant, or one image could make the whole gradient infinite, or NaN
    (infinity times no advantage): summed log-probs (`sample.reduction="sum"`) get there.
    """
    ratio = jnp.exp(jnp.minimum(log_ratio, 20.0))
    bounded = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return jnp.maximum(-advantage * ratio, -advantage * bounded), ratio
