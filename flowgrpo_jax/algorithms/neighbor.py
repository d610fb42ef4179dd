"""Neighbor GRPO: the ODE's step is drawn to the paths of better neighbours.

Source: Neighbor GRPO (arXiv 2511.16955). Neither the paper nor code was at hand: this was derived
anew from two independent notes on it.

A group starts from neighbouring noises, e_i = sqrt(1 - s^2) e + s d_i with e shared by the group
(`sample.neighbor_noise`, s), and follows the plain ODE by any solver. At
step t some images j of the group are anchors: from their latents the policy takes one Euler step,
to y_j. The latents x_i of all of the group's images after that step are the candidates, and

    p(i | j) = softmax over i of -|y_j - x_i|^2,     |.|^2: the sum over the latent's dimensions

stands for a policy. Its ratio r to that of the policy before the epoch has GRPO's loss,

    loss = mean over anchors j and candidates i of max(-A_i r, -A_i clip(r, 1 - c, 1 + c))

On policy y_j = x_j with Euler's solver, and minus the gradient by y_j is 2 / G times the sum over i
of A_i (x_i - m), with m the mean of the candidates under p: towards better ones, away from worse.

The paper has groups of 12, 4 anchors of a group, 4 steps, s = 0.3, and advantages by `quasi_norm`.
Only the anchors need a forward pass.

Not known, and chosen here: the steps are drawn for an epoch from all of the rollout's, the anchors
for a group and a step, and the clip range.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.algorithms import Algorithm, Figures, Setup, Velocities, copies, options, used
from flowgrpo_jax.algorithms.trust_regions import clipped
from flowgrpo_jax.sampling import sampler, sde
from flowgrpo_jax.types import Credit, Rollout


def make(anchors: int = 4, steps: int = 4, clip_range: float = 0.0) -> Algorithm:
    """
    Args:
      anchors: of a group and a step.
      steps: how many of the rollout's steps an epoch trains; 0 means all.
      clip_range: how far the ratio may move from 1; 0 means that the ratio is 1, which it is with
        one update an epoch, and spares the forward pass of the policy before the epoch.
    """
    options.at_least(1, anchors=anchors)
    options.at_least(0, steps=steps, clip_range=clip_range)

    def loss(
        setup: Setup,
        v: Velocities,
        rollout: Rollout,
        term: jax.Array,
        credit: Credit,
    ) -> tuple[jax.Array, Figures]:
        size = setup.group_size
        sigmas = jnp.asarray(setup.process.sigmas, jnp.float32)
        sigma, sigma_next = sigmas[term], sigmas[term + 1]
        rows = draw_anchors(rollout, term, size, anchors)
        x = rollout.x[term][rows]

        def log_policy(name: str) -> jax.Array:
            ends = sde.euler(x, v[name](x, sigma, rows), sigma, sigma_next)
            return log_prob(ends, rollout.x[term + 1], size)

        new = log_policy("policy")
        old = log_policy("old") if clip_range else jax.lax.stop_gradient(new)
        weight = credit.advantage.reshape(-1, 1, size)
        value, ratio = clipped(new - old, weight, clip_range or jnp.inf)
        figures = {"policy_loss": value.mean((1, 2)), "ratio_gap": jnp.abs(ratio - 1).max((1, 2))}
        figures = {name: jnp.repeat(of_group, size) for name, of_group in figures.items()}
        return figures["policy_loss"], figures

    def terms(setup: Setup, key: jax.Array) -> jax.Array:
        most, size = setup.process.steps, setup.group_size
        for name, value, limit, knob in (
            ("steps", steps, most, "sample.steps"),
            ("anchors", anchors, size, "sample.group_size"),
        ):
            if value > limit:
                raise ValueError(
                    f"algorithm.options.{name}={value}: must be at most {knob}={limit}"
                )
        return jnp.sort(jax.random.permutation(key, most)[: steps or most])

    return Algorithm(
        loss,
        terms,
        figures=("policy_loss", "ratio_gap"),
        records="path",
        passes=lambda setup: anchors / setup.group_size,
        reads=used(old=clip_range),
        copies={"old": copies.fresh} if clip_range else {},
        whole="group",
        worst=("ratio_gap",),
        summary=f"Neighbor GRPO, {anchors} anchors at {steps or 'all'} steps, clip {clip_range:g}",
    )


def draw_anchors(rollout: Rollout, term: jax.Array, size: int, anchors: int) -> jax.Array:
    """Draw the anchors of each group for a step: rows of the micro-batch, i32 [P x B]."""

    def places(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, sampler.ANCHOR_KEY)
        return jax.random.permutation(jax.random.fold_in(key, term), size)[:anchors]

    firsts = jnp.arange(0, rollout.keys.shape[0], size)
    return (firsts[:, None] + jax.vmap(places)(rollout.keys[firsts])).reshape(-1)


def log_prob(ends: jax.Array, candidates: jax.Array, size: int) -> jax.Array:
    """Return log p(i | j), f32 [P, B, G].

    Args:
      ends: f32 [P x B, H, W, C], where the anchors' steps lead; candidates: f32 [P x G, H, W, C].
    """
    shape = ends.shape[1:]
    groups = candidates.shape[0] // size
    y, x = ends.reshape(groups, -1, 1, *shape), candidates.reshape(groups, 1, size, *shape)
    return jax.nn.log_softmax(-jnp.square(y - x).sum((3, 4, 5)), axis=-1)
