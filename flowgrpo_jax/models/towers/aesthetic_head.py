"""The head of the LAION aesthetic predictor, which ImageReward took over: width to one number."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowgrpo_jax.models.layers import Linear

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = ("0", "2", "4", "6", "7")  # in the published `nn.Sequential`; between them is dropout


class Head(nnx.Module):
    """Five linear layers, and no activation between them: the published weights have none.

    Source: christophschuhmann/improved-aesthetic-predictor.
    """

    def __init__(self, width: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        sizes = pairwise((width, *WIDTHS))
        linears = [Linear(n_in, n_out, dtype=dtype, rngs=rngs) for n_in, n_out in sizes]
        self.layers = nnx.Dict(dict(zip(PLACES, linears, strict=True)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Embeddings [B, D] -> scores [B]."""
        for place in PLACES:
            x = self.layers[place](x)
        return x[:, 0]
