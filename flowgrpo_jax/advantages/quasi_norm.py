"""The quasi-norm of Neighbor GRPO (arXiv 2511.16955), equation 11."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowgrpo_jax.advantages import Advantage, Memory, normalised, weighted


def quasi_norm(group_size: int, clip: float, power: float = 0.8) -> Advantage:
    """The deviation c from the group's mean, divided by the group's (sum |c|^p)^(1/p) + 1e-4.

    Of two groups with the same standard deviation, one whose images all differ a little gets less
    than one with an image that stands out, which should keep noise of the reward from being
    learned. p = 2 is `group` but for a factor: advantages are 1 / sqrt(G) as large there, and about
    G^(-1/p) as large for a p below 2, 1/22 for the defaults with G = 12. Adam takes such a factor
    out; a KL weighs more beside it.

    The paper was not at hand: the formula is that of two independent notes on it. There it divides
    advantages that were divided by the standard deviation before, which cancels; the 1e-4 is ours,
    as in `group`.

    Args:
      power: p, above 0 and at most 2.
    """
    if not 0 < power <= 2:
        raise ValueError(
            f"advantage.options.power={power}: must be above 0 and at most 2; the paper's is 0.8"
        )

    def compute(
        memory: Memory, scores: jax.Array, weights: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, Memory]:
        total, valid = weighted(scores, weights)
        centred = normalised(total, valid, group_size=group_size, std="none", clip=jnp.inf)
        groups = centred.reshape(-1, group_size)
        # Of the shares of the largest, whose powers neither overflow nor vanish.
        largest = jnp.maximum(jnp.abs(groups).max(1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        shares = jnp.abs(groups) / largest
        size = largest * (shares**power).sum(1, keepdims=True) ** (1 / power)
        return jnp.clip(groups / (size + 1e-4), -clip, clip).reshape(-1), memory

    return Advantage(compute)
