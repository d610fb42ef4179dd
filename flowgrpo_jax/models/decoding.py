"""Decode the latents of a micro-batch a few at a time, so that fewer of them need memory at once.

The decoder works at the full size of a picture, in float32: at 512 px each one takes 1.4 GB of
memory, which is more than what the transformer needs for it. One at a time also moves less over HBM
(docs/performance.md), and small pictures are decoded faster on a CPU when they fit into its caches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import jax
from jax.sharding import Mesh, PartitionSpec

from flowgrpo_jax import sharding
from flowgrpo_jax.types import Params, Pictures

Decode = Callable[[Params, jax.Array], Pictures]
PIXELS = 512 * 512  # that a device decodes at once, unless the recipe says otherwise


def automatic(height: int, width: int) -> int:
    """Return how many images of this size in pixels a device decodes at once; at least one."""
    return max(PIXELS // (height * width), 1)


@lru_cache(maxsize=32)  # one function for the same arguments, by which programs are cached
def in_parts(decode: Decode, mesh: Mesh, at_once: int) -> Decode:
    """Return `decode` with each device at work on at most `at_once` of its images at a time.

    Args:
      decode: (weights, latents [M, H, W, C]) -> Pictures of M images, each independent of the rest.
      at_once: at least 1; the largest divisor of a device's images up to it is taken.
    """
    shards = sharding.row_shards(mesh)

    def decoded(weights: Params, latents: jax.Array) -> Pictures:
        images, left = divmod(latents.shape[0], shards)
        size = max(n for n in range(1, at_once + 1) if images % n == 0)
        if left or size >= images:
            return decode(weights, latents)

        # Each device has a loop of its own. Where XLA divides one loop among the devices, it lays
        # out the convolutions for the images of all of them, and copies arrays out of that layout.
        def own(weights: Params, latents: jax.Array) -> Pictures:
            parts = latents.reshape(-1, size, *latents.shape[1:])
            done = jax.lax.map(partial(decode, weights), parts)
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)

        specs = PartitionSpec(), sharding.ROWS
        mapped = jax.shard_map(
            own, mesh=mesh, in_specs=specs, out_specs=sharding.ROWS, check_vma=False
        )
        return mapped(weights, latents)

    return decoded
