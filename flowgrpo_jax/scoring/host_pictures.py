"""The pictures of an epoch in the memory of every process."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from flowgrpo_jax import sharding
from flowgrpo_jax.types import Pictures


class HostPictures:
    """Collects the pictures of all micro-batches, one micro-batch behind the devices.

    A micro-batch is fetched when the next one is added, so that the devices draw meanwhile. Every
    process must add the same micro-batches, and fetch, together.

    Attributes:
      finite: bool [B], whether all pixels of a picture are finite; False where it is still to come.
      pixels: uint8 [B, H, W, 3]; empty unless they are kept.
      count: the number of pictures that are here, from the first one on.
    """

    def __init__(self, images: int, mesh: Mesh, *, keep_pixels: bool):
        """
        Args:
          images: how many count, B; those that are added after them are padding.
        """
        self.finite, self.pixels = np.zeros(images, bool), np.zeros(0, np.uint8)
        self.count = 0
        self._mesh, self._keep_pixels = mesh, keep_pixels
        self._coming: tuple[jax.Array, ...] = ()

    def add(self, pictures: Pictures) -> None:
        """Add the next micro-batch, and fetch the one before it."""
        parts = (pictures.finite, pictures.pixels) if self._keep_pixels else (pictures.finite,)
        coming = sharding.begin_allgather(self._mesh, parts)
        self.fetch()
        self._coming = coming

    def fetch(self) -> None:
        """Fetch the micro-batch that was added last, if it is still to come."""
        if not self._coming:
            return
        finite, *pixels = map(sharding.to_host, self._coming)
        size = min(len(finite), len(self.finite) - self.count)
        rows = slice(self.count, self.count + size)
        self.finite[rows] = finite[:size]
        for part in pixels:
            if not self.pixels.size:
                self.pixels = np.empty((len(self.finite), *part.shape[1:]), part.dtype)
            self.pixels[rows] = part[:size]
        self.count, self._coming = self.count + size, ()
