"""Branches: images of a group that share the first part of their path.

A *node* is a set of images in a row, by their places in the group, that have had the same path so
far. At first it is `leaves` images, which start from the same noise. At a *split* every node falls
into `factor` nodes, each with noise of its own from there on, until every image is a node of its
own. What the images of a node have in common is computed once.

  one split, at the window's first step   TempFlow-GRPO (arXiv 2508.04324): a path of the ODE, and
                                          branches of it that differ by one stochastic step
  several, at given steps                 BranchGRPO (2509.06040): a tree of stochastic steps

The noise of a node's step is that of its first image. It is drawn from that image's own key, so
that a tree does not depend on how the batch is cut; a cut through a node only computes it twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Velocity = Callable[..., jax.Array]


@dataclass(frozen=True)
class Branches:
    """Static under jit. A node at a *level*, after so many splits, has `sizes[level]` images.

    Attributes:
      leaves: images that start from the same noise; 1: each has its own.
      splits: the steps that split the nodes, ascending; (): the first step of the window alone.
      noise: factor of the noise that is drawn at a split; log-probs do not know of it, so that
        they are not those of what was drawn where it is not 1 (as in BranchGRPO's code).
    """

    leaves: int = 1
    splits: tuple[int, ...] = ()
    noise: float = 1.0

    @property
    def factor(self) -> int:
        """The nodes that a node is split into."""
        return round(self.leaves ** (1 / max(len(self.splits), 1)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images of a node at each level, from `leaves` to 1."""
        if self.leaves == 1:
            return (1,)
        return tuple(self.factor**n for n in range(max(len(self.splits), 1), -1, -1))

    def split_steps(self, start: jax.Array | int) -> jax.Array:
        """Return the steps that split nodes, i32 [splits], for a window that begins at start."""
        if self.leaves == 1:
            return jnp.zeros(0, jnp.int32)
        return jnp.asarray(self.splits, jnp.int32) if self.splits else jnp.reshape(start, (1,))

    def level(self, step: jax.Array | int, start: jax.Array | int) -> jax.Array:
        """Return the level of the states before a step, i32."""
        return (step > self.split_steps(start)).sum(dtype=jnp.int32)


ALONE = Branches()


def check(branches: Branches, group_size: int, low: int, high: int, window: int) -> None:
    """Raise ValueError that names the knob, the constraint and the fix.

    Args:
      low, high, window: the steps [low, high) among which the window lies, and its size.
    """
    leaves, splits = branches.leaves, branches.splits
    if leaves < 1 or group_size % leaves:
        raise ValueError(
            f"sample.branches={leaves}: the images that start from the same noise must divide"
            f" sample.group_size={group_size}; 0 means all of a group"
        )
    if not branches.noise > 0:
        raise ValueError(f"sample.split_noise={branches.noise}: must be above 0; 1 is the kernel's")
    if not splits:
        return
    if list(splits) != sorted(set(splits)):
        raise ValueError(f"sample.splits={splits}: must be different steps in ascending order")
    if leaves < 2 or branches.factor ** len(splits) != leaves:
        raise ValueError(
            f"sample.branches={leaves}: a tree of {len(splits)} splits has"
            f" {2 ** len(splits)} leaves, or {3 ** len(splits)} where each makes three of one"
        )
    if (low, high) != (0, window) or splits[0] < 0 or splits[-1] >= window:
        raise ValueError(
            f"sample.splits={splits}: must lie in a window that is fixed at the first step, of"
            f" sample.window={window} steps within [{low}, {high}): set sample.window_range=(0, 0)"
            " and a window of more steps than the last split"
        )


class Nodes(NamedTuple):
    """How a micro-batch of M images shares its forward passes."""

    keys: jax.Array  # [levels, M], at each level the key of the first image of the image's node
    sizes: tuple[int, ...]  # images in a row that a forward pass serves, at each level


def nodes(
    branches: Branches, keys_of: Callable[[jax.Array], jax.Array], image: jax.Array, shards: int
) -> Nodes:
    """
    Args:
      keys_of: places in the group i32 [M] -> the keys of these images [M].
      image: i32 [M], each image's place in its group.
      shards: equal parts that the M images are cut into, each on devices of its own.
    """
    keys = jnp.stack([keys_of(image // size * size) for size in branches.sizes])
    return Nodes(keys, served(branches, image.shape[0] // shards))


def served(branches: Branches, images: int) -> tuple[int, ...]:
    """Return how many images a forward pass serves at each level, where `images` are together."""
    return tuple(math.gcd(size, images) for size in branches.sizes)


def once_a_node(
    velocity: Velocity,
    sizes: Sequence[int],
    level: jax.Array,
    x: jax.Array,
    sigma: jax.Array,
) -> jax.Array:
    """Return the velocity f32 [M, H, W, C] of M images of which each sizes[level] in a row are
    equal, computed for the first of them.

    Args:
      velocity: takes M / size images, the first of every `size`.
    """

    def computed(size: int, x: jax.Array, sigma: jax.Array) -> jax.Array:
        first = x.reshape(-1, size, *x.shape[1:])[:, 0]
        return jnp.repeat(velocity(first, sigma), size, axis=0)

    return jax.lax.switch(level, [partial(computed, size) for size in sizes], x, sigma)


def shared(
    velocities: Mapping[str, Velocity],
    branches: Branches,
    window: int,
    shards: int,
    step: jax.Array,
    start: jax.Array,
) -> Mapping[str, Velocity]:
    """Return the velocities at the states before a step of the window, computed once a node.

    Args:
      window: the steps of the window, which begins at `start`; shards: as in `nodes`.
    """
    if branches.leaves == 1:
        return velocities
    # A split at the window's last step is followed by no further state before a step.
    levels = 1 + sum(split < window - 1 for split in branches.splits or (0,))

    def once(velocity: Velocity, x: jax.Array, sigma: jax.Array) -> jax.Array:
        sizes = served(branches, x.shape[0] // shards)[:levels]
        return once_a_node(velocity, sizes, branches.level(step, start), x, sigma)

    return {name: partial(once, velocity) for name, velocity in velocities.items()}


def forwards(
    branches: Branches, sigmas: Sequence[float] | np.ndarray, start: int, images: int
) -> float:
    """Return the velocities that a rollout computes, per image.

    Args:
      sigmas: of the rollout; after the first 0 nothing is computed.
      images: as in `served`.
    """
    return states(branches, range(np.count_nonzero(np.asarray(sigmas)[:-1])), start, images)


def states(branches: Branches, steps: Iterable[int], start: int, images: int) -> float:
    """Return the number of different states before some steps, per image.

    Args:
      images: as in `served`.
    """
    sizes = served(branches, images)
    return sum(1 / sizes[int(branches.level(int(step), start))] for step in steps)
