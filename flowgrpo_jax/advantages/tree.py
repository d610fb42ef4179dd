"""BranchGRPO's advantage (arXiv 2509.06040): rewards of a tree's leaves, fused towards its root.

A node is worth what the leaves below it scored, on average. Every edge from a node to its child has
the child's advantage, which compares the nodes of one depth of one tree. Images carry their whole
path, so that an edge stands in each of the images below it; it is weighted to count once, and the
loss is the mean over edges.

Source: Fredreic1849/BranchGRPO. Deviations from there:
  * A window that is pruned begins at the end of the path; upstream it is listed. What is pruned is
    computed all the same, with weight 0.
  * Leaves are pruned tree by tree; upstream ranks those of all trees of a process. Its other mode,
    which keeps the first steps after the last split, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.advantages import (
    Advantage,
    Memory,
    masked_deviation,
    masked_mean,
    weighted,
)
from flowgrpo_jax.sampling.branching import Branches

FUSIONS = ("mean", "softmax")


def tree(
    group_size: int,
    clip: float,
    branches: Branches,
    steps: int,
    fusion: str = "mean",
    alpha: float = 1.0,
    prune: int = 0,
    prune_every: int = 30,
    keep_leaves: int = 0,
) -> Advantage:
    """The deviation from the mean of the nodes of one depth of one tree, over their sample standard
    deviation. Without splits the tree is the group, whose images share nothing.

    Args:
      branches: the tree; steps: those of the window, W.
      fusion: a node's worth, the "mean" of the leaves below it, or of its children with weights
        "softmax" of alpha x the log-prob of their edges.
      prune: so many steps in a row are not trained, at first the last ones. They move one step
        towards the root after every `prune_every` epochs, until the last split is among them.
      keep_leaves: after the last split only so many leaves of a tree are trained, the best and the
        worst ones, half of each; 0: all.
    """
    leaves = branches.leaves if branches.splits else group_size
    _check(fusion, alpha, prune, prune_every, keep_leaves, steps, leaves)
    splits = np.asarray(branches.splits, int)
    sizes = branches.sizes if branches.splits else (1,)  # leaves below a node of each level
    level_of_step = (np.arange(steps)[:, None] >= splits).sum(1)  # [W], of the node it leads to
    below = np.array(sizes)[level_of_step]
    edge_weight = (1 / below) / np.mean(1 / below)  # [W], so that each edge counts once
    after_splits = np.arange(steps) > max(branches.splits, default=-1)

    def compute(
        memory: Memory,
        scores: jax.Array,
        weights: jax.Array,
        ids: jax.Array,
        log_prob: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        total, valid = weighted(scores, weights)
        worth = jnp.where(valid, total, 0.0).reshape(-1, leaves)
        known = valid.reshape(-1, leaves).astype(jnp.float32)
        # There are log-probs with the fusion "softmax" alone.
        log_weights = [] if log_prob is None else _log_weights(log_prob, splits, sizes, alpha)
        levels = _by_level(worth, known, sizes, branches.factor, log_weights, clip)
        advantage = levels[level_of_step] * edge_weight[:, None, None]
        if keep_leaves:
            extreme = _extreme(levels[-1], keep_leaves)
            advantage *= jnp.where(after_splits[:, None, None], extreme, 1.0)
        if prune:
            trained = _unpruned(memory["epochs"], steps, prune, prune_every, max(splits, default=0))
            advantage *= trained[:, None, None]
            memory = {"epochs": memory["epochs"] + 1}
        return advantage.reshape(steps, -1), memory

    def initial(prompts: int) -> Memory:
        return {"epochs": jnp.zeros((), jnp.int32)} if prune else {}

    return Advantage(compute, initial, reads_log_prob=fusion == "softmax")


def fused(
    worth: jax.Array, known: jax.Array, children: int, log_weights: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return what the parents of nodes [trees, N] are worth: the mean of their children, all of
    which have as many leaves below them, or with weights softmax(log_weights [trees, N]).

    Args:
      known: the leaves with a score below each node, f32; a node without any counts for nothing.

    Returns the worth and the number of such leaves, f32 [trees, N / children].
    """
    values, counts = (x.reshape(x.shape[0], -1, children) for x in (worth, known))
    if log_weights is None:
        shares = counts
    else:
        logs = jnp.where(counts > 0, log_weights.reshape(counts.shape), -jnp.inf)
        shares = jnp.nan_to_num(jax.nn.softmax(logs, axis=2))
    total = jnp.maximum(shares.sum(2), jnp.finfo(jnp.float32).tiny)
    return (shares * values).sum(2) / total, counts.sum(2)


def _log_weights(
    log_prob: jax.Array, splits: np.ndarray, sizes: Sequence[int], alpha: float
) -> list[jax.Array]:
    """Return alpha x the log-probs [W, B] of the edges that lead to the nodes of each level but the
    root's, [trees, N]."""
    return [
        alpha * log_prob[step].reshape(-1, sizes[0])[:, ::size]
        for step, size in zip(splits, sizes[1:])
    ]


def _by_level(
    worth: jax.Array,
    known: jax.Array,
    sizes: Sequence[int],
    factor: int,
    log_weights: Sequence[jax.Array],
    clip: float,
) -> jax.Array:
    """Return the advantages of the nodes above each leaf, f32 [levels, trees, leaves].

    Args:
      worth, known: of the leaves, f32 [trees, leaves], as in `fused`.
      sizes: leaves below a node of each level, from the root; factor: the children of a node.
      log_weights: those of `fused` for each level but the root's; empty: none.
    """
    found = []
    for level in reversed(range(len(sizes))):
        found.append(jnp.repeat(_compared(worth, known, clip), sizes[level], axis=1))
        if level:
            weights = log_weights[level - 1] if log_weights else None
            worth, known = fused(worth, known, factor, weights)
    return jnp.stack(found[::-1])


def _compared(worth: jax.Array, known: jax.Array, clip: float) -> jax.Array:
    """Return the nodes' advantages f32 [trees, N]: 0 for one node, and where all are alike."""
    mask = (known > 0).astype(jnp.float32)
    deviation = masked_deviation(worth, mask, 1, sample=True)
    centred = (worth - masked_mean(worth, mask, 1)) * mask
    return jnp.clip(jnp.where(deviation < 1e-6, 0.0, centred / (deviation + 1e-8)), -clip, clip)


def _extreme(advantage: jax.Array, keep: int) -> jax.Array:
    """Return which leaves [trees, leaves] are among the best and the worst of their tree, f32."""
    rank = jnp.argsort(jnp.argsort(-advantage, axis=1), axis=1)  # 0: the best
    return ((rank < keep // 2) | (rank >= advantage.shape[1] - (keep - keep // 2))).astype(
        jnp.float32
    )


def _unpruned(epoch: jax.Array, steps: int, prune: int, every: int, last_split: int) -> jax.Array:
    """Return which steps are trained, f32 [W]."""
    most = max(steps - prune + 1 - last_split, 0)  # upstream counts the depth of a step's child
    first = steps - prune - jnp.minimum(epoch // every, most)
    step = jnp.arange(steps)
    return ((step < first) | (step >= first + prune)).astype(jnp.float32)


def _check(
    fusion: str,
    alpha: float,
    prune: int,
    prune_every: int,
    keep_leaves: int,
    steps: int,
    leaves: int,
) -> None:
    if fusion not in FUSIONS:
        raise ValueError(f"advantage.options.fusion={fusion!r}: choose from {', '.join(FUSIONS)}")
    for name, value, least, most in (
        ("alpha", alpha, 0, None),
        ("prune", prune, 0, steps - 1),
        ("prune_every", prune_every, 1, None),
        ("keep_leaves", keep_leaves, 0, leaves),
    ):
        if value < least or (most is not None and value > most):
            limit = f"between {least} and {most}" if most is not None else f"at least {least}"
            raise ValueError(f"advantage.options.{name}={value}: must be {limit}")
    if keep_leaves == 1:
        raise ValueError("advantage.options.keep_leaves=1: keep the best and the worst, 2, or more")
