"""Group-relative advantages and the clipped policy loss. Pure functions; imports only jax.

Source: Flow-GRPO (arXiv 2505.05470) eq. 3 to 5; DeepSeekMath (arXiv 2402.03300) for the group.
Losses come back unreduced, one per image.

Deviation from yifan123/flow_grpo: images whose group has no spread keep their place with advantage
0 in place of being filtered out, so shapes, and with them the recorded log-probs, stay exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

STD_MODES = ("group", "global", "none")


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
    mean = _mean(r, w, axis=1)
    centred = (r - mean) * w
    if std == "group":
        scale = jnp.sqrt(_mean(jnp.square(centred), w, axis=1)) + epsilon
    elif std == "global":
        overall = _mean(r, w, axis=None)
        scale = jnp.sqrt(_mean(jnp.square((r - overall) * w), w, axis=None)) + epsilon
    else:
        scale = jnp.ones(())
    return jnp.clip(centred / scale, -clip, clip).reshape(-1)


def _mean(x: jax.Array, weight: jax.Array, axis: int | None) -> jax.Array:
    """Weighted mean. The second pass removes the rounding of the first: equal rewards have exactly
    their own value as mean, and so exactly no advantage."""
    total = jnp.maximum(weight.sum(axis, keepdims=True), 1.0)
    mean = (x * weight).sum(axis, keepdims=True) / total
    return mean + ((x - mean) * weight).sum(axis, keepdims=True) / total


def policy_loss(
    log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array, clip_range: float
) -> tuple[jax.Array, jax.Array]:
    """(loss [M], ratio [M]): max(-A r, -A clip(r, 1 - c, 1 + c)), r = exp(log_prob - old)."""
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return jnp.maximum(-advantage * ratio, -advantage * clipped), ratio
