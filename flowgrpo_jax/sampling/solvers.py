"""Solvers of the probability-flow ODE, for the steps without noise. One row each in `TABLE`.

  euler     the first-order step
  dpmpp_2m  DPM-Solver++ (2M), the second-order multistep solver with the midpoint rule (Lu et al.,
            arXiv 2211.01095, algorithm 2), on the flow's schedule alpha = 1 - sigma; as diffusers'
            DPMSolverMultistepScheduler with flow_prediction

Both take one forward pass a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowgrpo_jax import tables
from flowgrpo_jax.sampling import sde

Memory = Any  # a tree of arrays


class Solver(NamedTuple):
    """A solver, which may remember its last steps.

    Attributes:
      begin: x f32 [M, H, W, C] -> what it remembers before the first step.
      step: (memory, x, v, sigma, sigma_next) -> (x at sigma_next, memory). x, v: f32 [M, H, W, C],
        v being the velocity at x and sigma; sigma, sigma_next: scalars, sigma_next < sigma.
    """

    begin: Callable[[jax.Array], Memory]
    step: Callable[..., tuple[jax.Array, Memory]]


def _euler(memory: Memory, x, v, sigma, sigma_next) -> tuple[jax.Array, Memory]:
    return sde.euler(x, v, sigma, sigma_next), memory


def _begin_2m(x: jax.Array) -> Memory:
    """A prediction at sigma = 1, which is infinitely far away in log-SNR and so has no weight."""
    return jnp.zeros_like(x), jnp.ones((), jnp.float32)


def _step_2m(memory: Memory, x, v, sigma, sigma_next) -> tuple[jax.Array, Memory]:
    """Euler's step with the picture x_0 extrapolated to the step's middle, in log-SNR.

    With alpha = 1 - sigma the exponential step x' = (sigma' / sigma) x + alpha' (1 - e^-h) x_0 has
    alpha' (1 - e^-h) = 1 - sigma' / sigma: for the x_0 that v predicts it is Euler's. The second
    order puts x_0 + h / (2 h_before) (x_0 - x_0 before) there, h being the steps in log-SNR. The
    steps from sigma = 1 and to 0 are infinitely long and stay Euler's.
    """
    before, sigma_before = memory
    x_0 = x - sigma * v

    def log_snr(s: jax.Array) -> jax.Array:
        return jnp.log1p(-s) - jnp.log(s)

    lengths = (log_snr(sigma_next) - log_snr(sigma)) / (log_snr(sigma) - log_snr(sigma_before))
    weight = jnp.where((sigma < 1) & (sigma_next > 0), lengths / 2 * (1 - sigma_next / sigma), 0.0)
    return sde.euler(x, v, sigma, sigma_next) + weight * (x_0 - before), (x_0, sigma)


EULER = Solver(lambda x: (), _euler)
DPMPP_2M = Solver(_begin_2m, _step_2m)

TABLE = {
    "euler": "flowgrpo_jax.sampling.solvers:EULER",
    "dpmpp_2m": "flowgrpo_jax.sampling.solvers:DPMPP_2M",
}


def load(name: str) -> Solver:
    """Return the solver of a row of `TABLE`, or "package.module:NAME" of the user's own."""
    return tables.check(tables.find(TABLE, name, "solver"), Solver, name)
