"""Group-relative advantages and the clipped policy loss. Pure functions; imports only jax.

Source: Flow-GRPO (arXiv 2505.05470) eq. 3 to 5; DeepSeekMath (arXiv 2402.03300) for the group.
Losses come back unreduced, one per image.

Deviation from yifan123/flow_grpo: images whose group has no spread keep their place with advantage
0 in place of being filtered out, so shapes, and with them the recorded log-probs, stay exact.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

COMBINATIONS = ("rewards", "advantages")


def weighted(scores: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Several rewards as one: (sum of weight x score f32 [B], valid bool [B]).

    Args:
      scores: f32 [K, B]; NaN where a reward failed.
      weights: f32 [K, B]; a score of weight 0 or NaN (does not apply) cannot spoil an image.
    """
    trained = jnp.nan_to_num(weights) != 0
    finite = jnp.isfinite(scores)
    total = jnp.where(trained & finite, weights * scores, 0.0).sum(0)
    return total, (finite | ~trained).all(0)


def combined_advantages(
    scores: jax.Array,
    weights: jax.Array,
    *,
    group_size: int,
    combine: str = "rewards",
    std: str = "group",
    clip: float = 5.0,
) -> jax.Array:
    """Advantages f32 [B] of several rewards, see `weighted` for the arguments' shapes.

    Args:
      combine: "rewards" normalises the weighted sum of the scores. "advantages" normalises every
        reward by itself, adds them by weight and brings the sum back to a standard deviation of
        one over the batch (GDPO, arXiv 2601.05242): a large range does not drown a small one.
    """
    total, valid = weighted(scores, weights)
    if combine == "rewards":
        return advantages(total, valid, group_size=group_size, std=std, clip=clip)
    each = jax.vmap(lambda r, ok: advantages(r, ok, group_size=group_size, std=std, clip=jnp.inf))(
        jnp.nan_to_num(scores), valid & jnp.isfinite(scores)
    )
    mixed, _ = weighted(each, weights)
    spread = jnp.sqrt(_mean(jnp.square(mixed), valid.astype(jnp.float32), axis=None))
    return jnp.clip(jnp.where(valid, mixed / (spread + 1e-4), 0.0), -clip, clip)


def advantages(
    rewards: jax.Array,
    valid: jax.Array,
    *,
    group_size: int,
    std: str = "group",
    clip: float = 5.0,
    epsilon: float = 1e-4,
) -> jax.Array:
    """(reward - mean of its group) / (std + epsilon), clipped to +-clip. f32 [B].

    Args:
      rewards: f32 [B], B = P x G, group-contiguous.
      valid: bool [B]; invalid images count in no statistic and get advantage 0.
      std: population std over the "group", over all images ("global"), or "none" for no division.
    """
    r = jnp.where(valid, rewards, 0.0).reshape(-1, group_size).astype(jnp.float32)
    w = valid.reshape(-1, group_size).astype(jnp.float32)
    centred = (r - _mean(r, w, axis=1)) * w
    return jnp.clip(centred / STD_MODES[std](r, w, epsilon), -clip, clip).reshape(-1)


def _deviation(r: jax.Array, w: jax.Array, axis: int | None) -> jax.Array:
    return jnp.sqrt(_mean(jnp.square((r - _mean(r, w, axis)) * w), w, axis))


# What centred rewards are divided by: f(rewards [P, G], weights [P, G], epsilon) -> [P or 1, 1].
STD_MODES: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "group": lambda r, w, epsilon: _deviation(r, w, 1) + epsilon,
    "global": lambda r, w, epsilon: _deviation(r, w, None) + epsilon,
    "none": lambda r, w, epsilon: jnp.ones((1, 1)),
}


def _mean(x: jax.Array, weight: jax.Array, axis: int | None) -> jax.Array:
    """Weighted mean. The second pass removes the rounding of the first: equal rewards have exactly
    their own value as mean, and so exactly no advantage."""
    total = jnp.maximum(weight.sum(axis, keepdims=True), 1.0)
    mean = (x * weight).sum(axis, keepdims=True) / total
    return mean + ((x - mean) * weight).sum(axis, keepdims=True) / total


def policy_loss(
    log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array, clip_range: float
) -> tuple[jax.Array, jax.Array]:
    """(loss [M], ratio [M]): max(-A r, -A clip(r, 1 - c, 1 + c)), r = exp(log_prob - old).

    Beyond e^20 the ratio is a constant, or one image could make the whole gradient infinite, or NaN
    (infinity times no advantage): summed log-probs (`sample.reduction="sum"`) get there.
    """
    ratio = jnp.exp(jnp.minimum(log_prob - old_log_prob, 20.0))
    clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return jnp.maximum(-advantage * ratio, -advantage * clipped), ratio


# f(log_prob [M], old_log_prob [M], advantage [M], clip_range) -> (loss [M], ratio [M])
LOSSES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {"clip": policy_loss}
