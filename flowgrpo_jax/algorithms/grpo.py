"""Flow-GRPO: the ratio of recorded transitions within a trust region, with a KL to a reference.

Source: Flow-GRPO (arXiv 2505.05470), equations 3 to 5. Its descendants are options: the weight of a
step (step_weights.py: TempFlow-GRPO, Flash-GRPO, GRPO-Guard) and the trust region
(trust_regions.py: GRPO-Guard, Flow-DPPO).

A micro-batch is replayed exactly as it was sampled (the same images, the same velocity function,
latents in f32), so before the first optimiser step of an epoch every ratio is 1; the figure
`ratio_gap` is the largest distance from it.

Deviation from yifan123/flow_grpo: images whose group has no spread keep their place with advantage
0 in place of being filtered out, so that shapes, and with them the recorded log-probs, stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import (
    Algorithm,
    Figures,
    Setup,
    Velocities,
    copies,
    options,
    step_weights,
    trust_regions,
    used,
)
from flowgrpo_jax.sampling import sde
from flowgrpo_jax.sampling.branching import Branches, shared
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.types import Credit, Rollout

STEP_CHOICES = ("random", "first")
FIGURES = (
    "policy_loss",
    "kl",
    "approx_kl",
    "log_prob_change",
    "clip_fraction",
    "ratio_gap",
)
KL_WEIGHTINGS = (*sde.KL_WEIGHTINGS, "velocity")


def make(
    clip_range: float = 1e-4,
    kl_beta: float = 0.0,
    kl_weighting: str = "exact",
    steps: int = 0,
    step_choice: str = "random",
    step_weight: str = "none",
    trust_region: str = "clip",
    kl_threshold: float = 1e-5,
    centering: bool = False,
    reset_every: int = 0,
) -> Algorithm:
    """
    Args:
      clip_range: how far the ratio may move from 1. The ratio is the exponential of a mean over
        latent dimensions with `sample.reduction="mean"`, hence the small default.
      kl_beta: weight of the KL to the reference; 0 spares its forward pass.
      kl_weighting: "exact", or "no_dt" as upstream, which wants a beta ten times larger, or
        "velocity", the squared distance |v - v_ref|^2 of Flow-Factory.
      steps: how many steps of the window an epoch trains; 0 means all.
      step_choice: which of them, "random" (drawn each epoch) or "first".
      step_weight: a row of step_weights.py, "none", "tempflow", "flash" or "guard".
      trust_region: a row of trust_regions.py, "clip", "guard" or "dppo".
      kl_threshold: of "dppo", the KL from which on transitions are dropped; it takes the place of
        `clip_range`. UniRL and verl-omni have 1e-5.
      centering: subtract the expected score from the gradient (trust_regions.measure).
      reset_every: optimiser steps after which the policy becomes its own reference, at the end of
        an epoch; 0 means never, so that the reference is the policy before training.
    """
    options.positive(clip_range=clip_range, kl_threshold=kl_threshold)
    options.at_least(0, kl_beta=kl_beta)
    options.at_least(0, steps=steps, meaning="all")
    options.at_least(0, reset_every=reset_every, meaning="never")
    options.one_of(KL_WEIGHTINGS, kl_weighting=kl_weighting)
    options.one_of(STEP_CHOICES, step_choice=step_choice)
    options.one_of(step_weights.TABLE, step_weight=step_weight)
    options.one_of(trust_regions.TABLE, trust_region=trust_region)
    _check_together(kl_beta, reset_every, trust_region, centering)
    limit = kl_threshold if trust_region == "dppo" else clip_range
    return Algorithm(
        partial(
            _loss,
            bound=trust_regions.TABLE[trust_region],
            limit=limit,
            weigh=step_weights.TABLE[step_weight],
            kl_beta=kl_beta,
            kl_weighting=kl_weighting,
            centering=centering,
        ),
        terms=partial(_terms, steps, step_choice, trust_region, centering),
        figures=FIGURES,
        records="window",
        reads=used(reference=kl_beta),
        copies={"reference": copies.reset(reset_every)} if reset_every else {},
        weighs_kl=kl_beta > 0,
        worst=("ratio_gap",),
        by_step=("log_prob_change",),
        warning=partial(_warning, jnp.inf if trust_region == "dppo" else clip_range),
        summary=_summary(steps, step_weight, trust_region, limit, kl_beta),
    )


def _loss(
    setup: Setup,
    v: Velocities,
    rollout: Rollout,
    term: jax.Array,
    credit: Credit,
    *,
    bound: Callable[..., trust_regions.Bounded],
    limit: float,
    weigh: Callable[..., jax.Array],
    kl_beta: float,
    kl_weighting: str,
    centering: bool,
) -> tuple[jax.Array, Figures]:
    """Return the loss [M] of a recorded transition, and its figures."""
    process, step = setup.process, rollout.start + term
    sigma = jnp.asarray(process.sigmas, jnp.float32)[step]
    x, x_next = rollout.x[term], rollout.x[term + 1]
    v = shared(v, process.branches, process.window, setup.shards, step, rollout.start)
    velocity = v["policy"](x, sigma)
    new = process.transition(x, velocity, step, x_next=x_next)
    move = trust_regions.measure(process, rollout, term, new, centering)
    value, ratio, outside = bound(move, credit.advantage, limit)
    value *= weigh(process, rollout.start, step)
    kl = jnp.zeros_like(value)
    if kl_beta:
        kl = _kl(kl_weighting, process, x, velocity, v["reference"](x, sigma), step)
    figures = {
        "policy_loss": value,
        "kl": kl,
        "approx_kl": 0.5 * jnp.square(move.log_ratio),
        "log_prob_change": jnp.abs(move.log_ratio),
        "clip_fraction": outside.astype(jnp.float32),
        "ratio_gap": jnp.abs(ratio - 1),
    }
    return value + kl_beta * credit.weigh(kl), figures


def _kl(
    weighting: str,
    process: Process,
    x: jax.Array,
    velocity: jax.Array,
    reference: jax.Array,
    step: jax.Array,
) -> jax.Array:
    """Return the distance [M] of the policy's transition to the reference's."""
    if weighting == "velocity":
        return jnp.square(velocity - reference).mean(tuple(range(1, x.ndim)))
    sigmas = jnp.asarray(process.sigmas, jnp.float32)
    new, ref = (process.transition(x, u, step, x_next=x) for u in (velocity, reference))
    dt = sigmas[step + 1] - sigmas[step]
    forms = {"weighting": weighting, "reduction": process.reduction}
    return sde.kl(new.mean, ref.mean, new.std, dt, **forms)


def _terms(
    steps: int,
    step_choice: str,
    trust_region: str,
    centering: bool,
    setup: Setup,
    key: jax.Array,
) -> jax.Array:
    """Return the transitions that an epoch trains, as places in the window."""
    size = setup.process.window
    if steps > size:
        raise ValueError(
            f"algorithm.options.steps={steps}: the window has {size} steps to train; choose 1"
            f" to {size}, or 0 for all of them"
        )
    _check_noise(trust_region, centering, setup.process.branches)
    if steps in (0, size) or step_choice == "first":
        return jnp.arange(steps or size)
    return jnp.sort(jax.random.permutation(key, size)[:steps])


def _check_noise(trust_region: str, centering: bool, branches: Branches) -> None:
    """Raise ValueError where noise is drawn anew, from each image's own key, and is not what the
    image's transitions drew."""
    if trust_region == "clip" and not centering:
        return  # nothing is drawn anew
    redraws = "centering" if centering else trust_region
    instead = "set algorithm.options.trust_region to 'clip' and centering to False"
    if branches.splits:
        raise ValueError(
            f"sample.splits={branches.splits}: {redraws} draws the noise of each image anew,"
            f" which in a tree is that of others; {instead}"
        )
    if branches.leaves > 1 and branches.noise != 1:
        raise ValueError(
            f"sample.split_noise={branches.noise}: {redraws} draws the noise of each image"
            " anew, which at the split was multiplied by that; set sample.split_noise to 1, or"
            f" {instead}"
        )


def _warning(clip_range: float, figures: Mapping[str, float]) -> str:
    gap = figures["ratio_gap"]
    if gap <= clip_range:
        return ""
    return (
        f"ratio_gap {gap:.2g} exceeds clip_range {clip_range:.2g}: update and sampler disagree"
        " about the log-probs, and the clip cuts noise; use model.dtype='float32', or a larger"
        " clip_range"
    )


def _summary(steps: int, step_weight: str, trust_region: str, limit: float, kl_beta: float) -> str:
    count = steps or "all"
    weights = "" if step_weight == "none" else f", {step_weight} weights"
    return f"{count} steps of the window{weights}, {trust_region} {limit:g}, KL {kl_beta:g}"


def _check_together(kl_beta: float, reset_every: int, trust_region: str, centering: bool) -> None:
    """Raise ValueError for options that do not go together."""
    if reset_every and not kl_beta:
        raise ValueError(
            f"algorithm.options.reset_every={reset_every}: with kl_beta=0 nothing reads the"
            " reference; set kl_beta, or reset_every to 0"
        )
    if centering and trust_region == "guard":
        raise ValueError(
            "algorithm.options.centering=True: trust_region='guard' has a centred ratio already;"
            " set centering to False"
        )
