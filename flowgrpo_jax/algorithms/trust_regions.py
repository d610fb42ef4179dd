"""Trust regions: how far the policy may move a recorded transition x -> x' from the rollout's.

  clip   the clipped ratio r = p(x' | x) / p_old(x' | x): Flow-GRPO (arXiv 2505.05470), equation 5
  guard  the same with r = exp(mean(z d)), z being the transition's noise and d = mean - mean_old.
         It is the ratio to the power std, without the term of d^2 that makes the expected
         log-ratio negative: GRPO-Guard (2510.22319)
  dppo   no clip; a transition is dropped where the KL |d|^2 / (2 std^2) has reached the limit and r
         has moved in the direction of the advantage: Flow-DPPO (2606.11025)

The rollout's mean is mean_old = x' - std z, with z drawn anew from the image's key: exact, and
nothing has to be stored.

Means over the latent's dimensions are sums with `sample.reduction="sum"`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowgrpo_jax.sampling import sampler, sde
from flowgrpo_jax.types import Rollout


class Move(NamedTuple):
    """How the policy has moved M recorded transitions since the rollout."""

    log_ratio: jax.Array  # f32 [M], log p - log p_old
    shift: jax.Array  # f32 [M], mean(z d)
    kl: jax.Array  # f32 [M]


class Bounded(NamedTuple):
    """A policy-gradient loss within a trust region."""

    loss: jax.Array  # f32 [M]
    ratio: jax.Array  # f32 [M]
    outside: jax.Array  # bool [M], beyond the limit


def measure(
    process: sampler.Process,
    rollout: Rollout,
    term: jax.Array,
    new: sde.Transition,
    centering: bool,
) -> Move:
    """Compare transitions, scored anew, with those recorded in the rollout.

    Args:
      new: the rollout's transitions of the window's step `term` under the policy.
      centering: subtract the expected score under the rollout's mean, a control variate
        (radixark/miles_diffusion). The value stays; the gradient of the log-ratio becomes that of
        log p(x') - E_old[log p], and E_old[log p] is, but for a constant, log p(mean_old).
    """
    noise = sampler.normal(rollout.keys, sampler.SDE_KEY + rollout.start + term, new.mean.shape[1:])
    mean_old = new.x_next - new.std * noise
    log_ratio = new.log_prob - rollout.log_prob[term]
    forms = {"density": process.density, "reduction": process.reduction}
    if centering:
        expected = sde.log_prob(mean_old, new.mean, new.std, **forms)
        log_ratio -= expected - jax.lax.stop_gradient(expected)
    reduce = jnp.mean if process.reduction == "mean" else jnp.sum
    shift = reduce(noise * (new.mean - mean_old), axis=tuple(range(1, noise.ndim)))
    kl = sde.kl(new.mean, mean_old, new.std, 1.0, reduction=process.reduction)
    return Move(log_ratio, shift, kl)


def clip(move: Move, advantage: jax.Array, limit: float) -> Bounded:
    loss, ratio = clipped(move.log_ratio, advantage, limit)
    return Bounded(loss, ratio, jnp.abs(ratio - 1) > limit)


def guard(move: Move, advantage: jax.Array, limit: float) -> Bounded:
    loss, ratio = clipped(move.shift, advantage, limit)
    return Bounded(loss, ratio, jnp.abs(ratio - 1) > limit)


def dppo(move: Move, advantage: jax.Array, limit: float) -> Bounded:
    ratio = exp(move.log_ratio)
    further = jnp.where(advantage > 0, ratio > 1, ratio < 1) & (advantage != 0)
    dropped = further & (move.kl >= limit)
    return Bounded(jnp.where(dropped, 0.0, -advantage * ratio), ratio, dropped)


# (move, advantage [M], limit) -> Bounded
TABLE: dict[str, Callable[[Move, jax.Array, float], Bounded]] = {
    "clip": clip,
    "guard": guard,
    "dppo": dppo,
}


def clipped(
    log_ratio: jax.Array, advantage: jax.Array, clip_range: float
) -> tuple[jax.Array, jax.Array]:
    """Return (loss [M], ratio r [M]) of max(-A r, -A clip(r, 1 - c, 1 + c)), r = exp(log_ratio)."""
    ratio = exp(log_ratio)
    bounded = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return jnp.maximum(-advantage * ratio, -advantage * bounded), ratio


def exp(log_ratio: jax.Array) -> jax.Array:
    """Return the ratio, which beyond e^20 is a constant.

    Else one image could make the whole gradient infinite, or NaN (infinity times no advantage):
    summed log-probs (`sample.reduction="sum"`) get there.
    """
    return jnp.exp(jnp.minimum(log_ratio, 20.0))
