"""Rewards that run on the host: combined, guarded, and called in one of two ways.

`callback` puts the call inside the jitted program (an `io_callback` per device shard, under
`shard_map`: in plain jit the same callback would gather the batch onto one process).
`overlap` scores finished images in threads while the device samples the next ones.
Both return the same `Rewards`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

from flowgrpo_jax.types import Metadata, Reward, Rewards

log = logging.getLogger(__name__)

# score(images uint8 [M, H, W, 3], prompt ids i32 [M]) -> Rewards of numpy arrays
Score = Callable[[np.ndarray, np.ndarray], Rewards]


def guarded(
    name: str,
    reward: Reward,
    images: np.ndarray,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> tuple[np.ndarray, np.ndarray]:
    """A reward's scores f32 [B] and validity bool [B]; whatever goes wrong makes images invalid.

    A reward that raises, or returns the wrong shape, invalidates its batch and is logged; a score
    that is not finite invalidates its image.
    """
    n = len(images)
    try:
        raw_scores, raw_valid = reward(images, prompts, metadata)
        scores, valid = np.asarray(raw_scores, np.float32), np.asarray(raw_valid, bool)
        if scores.shape != (n,) or valid.shape != (n,):
            raise ValueError(f"returned shapes {scores.shape} and {valid.shape} for {n} images")
    except Exception:
        log.warning("reward %r failed on %d images; they get weight 0", name, n, exc_info=True)
        return np.zeros(n, np.float32), np.zeros(n, bool)
    valid = valid & np.isfinite(scores)
    return np.where(valid, scores, 0).astype(np.float32), valid


def composite(
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    lookup: Callable[[np.ndarray], tuple[Sequence[str], Sequence[Metadata]]],
    failed: float = 0.0,
) -> Score:
    """The weighted sum of rewards. A reward of weight 0 is logged and never trained on.

    Args:
      lookup: prompt ids i32 [M] -> their prompts and metadata.
      failed: what `parts` holds where a reward failed; NaN keeps it apart from a score.
    """

    def score(images: np.ndarray, ids: np.ndarray) -> Rewards:
        prompts, metadata = lookup(ids)
        total = np.zeros(len(images), np.float32)
        valid = np.ones(len(images), bool)
        parts = {}
        for name, reward in rewards.items():
            scores, ok = guarded(name, reward, images, prompts, metadata)
            parts[name] = np.where(ok, scores, np.float32(failed))
            if weights[name]:
                total += np.float32(weights[name]) * scores
                valid &= ok
        return Rewards(total, valid, parts)

    return score


def overlap(pool: Executor, score: Score, images: jax.Array, ids: jax.Array) -> Future[Rewards]:
    """Score in a thread, which waits for the device; the caller goes on dispatching."""
    return pool.submit(lambda: score(np.asarray(images), np.asarray(ids)))


def callback(
    score: Score, names: Sequence[str], mesh: Mesh, rows: PartitionSpec
) -> Callable[[jax.Array, jax.Array], Rewards]:
    """The same call from inside a jitted program: f(images, ids) -> Rewards of jax arrays.

    Args:
      names: the rewards that `score` returns as parts.
      mesh, rows: how the batch axis is laid out; each process scores its own shards.
    """

    def on_host(images: Any, ids: Any) -> Rewards:
        return score(np.asarray(images), np.asarray(ids))

    def per_shard(images: jax.Array, ids: jax.Array) -> Rewards:
        n = images.shape[0]
        floats = jax.ShapeDtypeStruct((n,), jnp.float32)
        booleans = jax.ShapeDtypeStruct((n,), jnp.bool_)
        shapes = Rewards(floats, booleans, dict.fromkeys(names, floats))
        return io_callback(on_host, shapes, images, ids, ordered=False)

    return jax.shard_map(
        per_shard, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False
    )
