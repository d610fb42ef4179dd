"""Sigma schedule, transition kernels, log-probabilities and KL. Pure functions of arrays.

Convention (Liu et al. 2022, Esser et al. 2024): x_sigma = (1 - sigma) x_0 + sigma x_1 with noise
x_1 ~ N(0, I); the model predicts the velocity v = x_1 - x_0; sampling takes sigma from 1 to 0.

Kernels are Gaussian, x' ~ N(mean, std^2 I):
  flow_sde  Euler-Maruyama step of an SDE with the ODE's marginals; Flow-GRPO (arXiv 2505.05470),
            equation 9
  cps       coefficients-preserving sampling (arXiv 2509.05952): the noise left in x' is exactly
            sigma'

Deviations from yifan123/flow_grpo:
  * `cps` has its true Gaussian log-prob by default; upstream drops 1 / (2 std^2) and the constant,
    which `density="squared_error"` reproduces.
  * sigma = 1 is recognised by its place (the first step), not by comparing floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax import tables

DENSITIES = ("gaussian", "squared_error")
REDUCTIONS = ("mean", "sum")
KL_WEIGHTINGS = ("exact", "no_dt")


def sigma_schedule(steps: int, shift: float = 3.0, train_timesteps: int = 1000) -> np.ndarray:
    """Sigmas f32 [steps + 1] from 1 to 0, as diffusers' FlowMatchEulerDiscreteScheduler.

    f(u) = shift u / (1 + (shift - 1) u) is applied to the ends of the training schedule and then
    again to the evenly spaced steps between them, so the last step before 0 is very small.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a rollout has at least 1 step")

    def f(u: Any) -> Any:
        return shift * u / (1 + (shift - 1) * u)

    sigma_min = float(f(np.float32(1 / train_timesteps)))
    sigmas = f(np.linspace(1.0, sigma_min, steps))
    return np.append(sigmas, 0.0).astype(np.float32)


class Gaussian(NamedTuple):
    """A transition's distribution: mean [M, H, W, C] and scalar std."""

    mean: jax.Array
    std: jax.Array


class Transition(NamedTuple):
    """A transition drawn (or given) and scored."""

    x_next: jax.Array  # f32 [M, H, W, C]
    log_prob: jax.Array  # f32 [M]
    mean: jax.Array  # f32 [M, H, W, C]
    std: jax.Array  # f32 scalar


def euler(x: jax.Array, v: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
    """One Euler step of the probability-flow ODE."""
    return x + (sigma_next - sigma) * v


def flow_sde(x, v, sigma, sigma_next, *, noise_level, sigma_max) -> Gaussian:
    """Flow-GRPO's Euler-Maruyama step with diffusion s = noise_level sqrt(sigma / (1 - sigma)).

    mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt, dt = sigma' - sigma.
    s is infinite at sigma = 1; there sigma_max, the schedule's second sigma, stands in under the
    root, as upstream does.
    """
    dt = sigma_next - sigma
    below_one = jnp.minimum(sigma, sigma_max)
    s = noise_level * jnp.sqrt(sigma / (1 - below_one))
    drift = s**2 / (2 * sigma)
    mean = x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt
    return Gaussian(mean, s * jnp.sqrt(-dt))


def cps(x, v, sigma, sigma_next, *, noise_level, sigma_max) -> Gaussian:
    """CPS step: of the noise sigma' that x' must hold, sin(noise_level pi / 2) of it is fresh."""
    del sigma_max
    angle = noise_level * math.pi / 2
    x_0, x_1 = x - sigma * v, x + (1 - sigma) * v
    mean = (1 - sigma_next) * x_0 + sigma_next * jnp.cos(angle) * x_1
    return Gaussian(mean, sigma_next * jnp.sin(angle))


class Kernel(NamedTuple):
    """A transition kernel, and what noise level it allows.

    Attributes:
      gaussian: f(x, v, sigma, sigma_next, *, noise_level, sigma_max) -> Gaussian.
      most_noise: the largest noise level; typical: a usual one, for error messages.
    """

    gaussian: Callable[..., Gaussian]
    most_noise: float = math.inf
    typical: float = 0.7


FLOW_SDE = Kernel(flow_sde, typical=0.7)
CPS = Kernel(cps, most_noise=1.0, typical=0.8)  # it takes a share of the noise

TABLE = {"flow_sde": "flowgrpo_jax.sde:FLOW_SDE", "cps": "flowgrpo_jax.sde:CPS"}


def load(name: str) -> Kernel:
    """Return the kernel of a row of `TABLE`, or "package.module:NAME" of the user's own."""
    return tables.find(TABLE, name, "kernel")


def log_prob(x, mean, std, *, density: str = "gaussian", reduction: str = "mean") -> jax.Array:
    """Log-density of x [M, H, W, C] under N(mean, std^2), reduced over all but the first axis.

    Args:
      density: "gaussian", or "squared_error": -(x - mean)^2, upstream's choice for CPS.
      reduction: "mean" as upstream (a ratio is then the D-th root of the true one, D = H W C), or
        "sum", the true log-density.
    """
    squared = jnp.square(x - mean)
    if density == "gaussian":
        value = -squared / (2 * std**2) - jnp.log(std) - 0.5 * math.log(2 * math.pi)
    else:
        value = -squared
    axes = tuple(range(1, x.ndim))
    return value.mean(axes) if reduction == "mean" else value.sum(axes)


def transition(
    kernel: Kernel,
    x: jax.Array,
    v: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    *,
    noise_level: float,
    sigma_max: float,
    noise: jax.Array | None = None,
    x_next: jax.Array | None = None,
    density: str = "gaussian",
    reduction: str = "mean",
) -> Transition:
    """Draw a transition from `noise`, or take the given `x_next`; either way score it.

    The sampler and the update both come here: what was drawn is what is scored. x_next is a
    constant to the gradient, as in upstream.

    Args:
      x, v: f32 [M, H, W, C]; sigma, sigma_next: scalars, sigma_next < sigma.
      sigma_max: the schedule's second sigma.
      noise: standard normal [M, H, W, C]; or x_next: [M, H, W, C].
    """
    mean, std = kernel.gaussian(
        x, v, sigma, sigma_next, noise_level=noise_level, sigma_max=sigma_max
    )
    if x_next is None:
        if noise is None:
            raise ValueError("a transition needs `noise` to draw from or the `x_next` to score")
        x_next = mean + std * noise
    x_next = jax.lax.stop_gradient(x_next)
    return Transition(
        x_next, log_prob(x_next, mean, std, density=density, reduction=reduction), mean, std
    )


def kl(mean, mean_ref, std, dt, *, weighting: str = "exact", reduction: str = "mean") -> jax.Array:
    """KL [M] of two transitions that share std: |mean - mean_ref|^2 / (2 std^2).

    weighting "no_dt" divides by s^2 = std^2 / |dt| in place of std^2, as upstream does for
    `flow_sde`: it stresses the late, short-noise steps and wants a beta about ten times larger.
    """
    variance = std**2 / jnp.abs(dt) if weighting == "no_dt" else std**2
    value = jnp.square(mean - mean_ref) / (2 * variance)
    axes = tuple(range(1, mean.ndim))
    return value.mean(axes) if reduction == "mean" else value.sum(axes)
