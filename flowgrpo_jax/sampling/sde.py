"""Sigma schedule, transition kernels, log-probabilities and KL. Pure functions of arrays.

Convention (Liu et al. 2022, Esser et al. 2024): x_sigma = (1 - sigma) x_0 + sigma x_1 with noise
x_1 ~ N(0, I); the model predicts the velocity v = x_1 - x_0; sampling takes sigma from 1 to 0.

Kernels are Gaussian, x' ~ N(mean, std^2 I). Every SDE with the ODE's marginals is named by its
diffusion g(sigma); a kernel takes a step of one:
  euler_maruyama  with the drift and g at the step's beginning: `flow_sde` (Flow-GRPO, arXiv
                  2505.05470, equation 9), `dance` (DanceGRPO, 2505.07818) and `flash` (Flash-GRPO,
                  2605.15980)
  exact           to the end of the step, with the predicted image held: `precise`,
                  `precise_dance` and `precise_flash` (PRECISE, 2605.23522)
  cps             coefficients-preserving sampling (2509.05952): the noise left in x' is exactly
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


class Diffusion(NamedTuple):
    """How much noise an SDE adds: g(sigma) dW, with a drift that keeps the ODE's marginals.

    Attributes:
      coefficient: (sigma, sigma_max) -> g / noise_level. sigma_max is the schedule's second sigma.
      integral: (sigma, sigma_next, sigma_max) -> the integral of (g / (noise_level u))^2 du from
        sigma_next to sigma.
    """

    coefficient: Callable[..., Any]
    integral: Callable[..., Any]


# At sigma = 1, where g is infinite, sigma_max stands in under the root, as upstream does.
FLOW_DIFFUSION = Diffusion(
    lambda sigma, sigma_max: jnp.sqrt(sigma / (1 - jnp.minimum(sigma, sigma_max))),
    lambda sigma, after, _: jnp.log(jnp.divide(sigma * (1 - after), after * (1 - sigma))),
)
DANCE_DIFFUSION = Diffusion(
    lambda sigma, _: jnp.ones_like(sigma),
    lambda sigma, after, _: jnp.divide(sigma - after, sigma * after),
)
FLASH_DIFFUSION = Diffusion(
    lambda sigma, sigma_max: sigma_max * sigma,
    lambda sigma, after, sigma_max: sigma_max**2 * (sigma - after),
)


def euler_maruyama(diffusion: Diffusion) -> Callable[..., Gaussian]:
    """The first-order step of an SDE: with dt = sigma' - sigma and g at sigma,

    mean = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt, std = g sqrt(-dt).
    It leaves more noise than sigma' where g sqrt(-dt) is not small beside sigma'
    (`excess_noise`).
    """

    def gaussian(x, v, sigma, sigma_next, *, noise_level, sigma_max) -> Gaussian:
        dt = sigma_next - sigma
        g = noise_level * diffusion.coefficient(sigma, sigma_max)
        drift = g**2 / (2 * sigma)
        mean = x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt
        return Gaussian(mean, g * jnp.sqrt(-dt))

    return gaussian


def exact(diffusion: Diffusion) -> Callable[..., Gaussian]:
    """The step of an SDE without error in the noise, for the image that v predicts (PRECISE).

    Derived here from the SDE. The paper's code, Tencent-Hunyuan/Precise, has the same mean and std
    for `precise` and `precise_dance`, with noise levels of 1.5 and 0.3.
    With the predicted image x_0 held over the step, the noise e = (x - (1 - sigma) x_0) / sigma
    follows de = -(g / sigma)^2 e / 2 dt + (g / sigma) dW, an Ornstein-Uhlenbeck process, whose
    solution at sigma' is rho e + sqrt(1 - rho^2) z, z ~ N(0, 1), with
    rho = exp(-1/2 integral of (g / u)^2 du). So x' holds exactly the noise sigma', in a step of
    any length; sigma = 1 needs no special case; and a step to sigma' = 0 has no noise.
    """

    def gaussian(x, v, sigma, sigma_next, *, noise_level, sigma_max) -> Gaussian:
        integral = noise_level**2 * diffusion.integral(sigma, sigma_next, sigma_max)
        integral = jnp.where(noise_level > 0, integral, 0.0)  # not 0 x infinity
        x_0, x_1 = x - sigma * v, x + (1 - sigma) * v
        mean = (1 - sigma_next) * x_0 + sigma_next * jnp.exp(-integral / 2) * x_1
        return Gaussian(mean, sigma_next * jnp.sqrt(-jnp.expm1(-integral)))

    return gaussian


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


FLOW_SDE = Kernel(euler_maruyama(FLOW_DIFFUSION), typical=0.7)
DANCE = Kernel(euler_maruyama(DANCE_DIFFUSION), typical=0.3)
FLASH = Kernel(euler_maruyama(FLASH_DIFFUSION), typical=1.0)
PRECISE = Kernel(exact(FLOW_DIFFUSION), typical=1.5)
PRECISE_DANCE = Kernel(exact(DANCE_DIFFUSION), typical=0.3)
PRECISE_FLASH = Kernel(exact(FLASH_DIFFUSION), typical=1.0)
CPS = Kernel(cps, most_noise=1.0, typical=0.8)  # it takes a share of the noise

TABLE = {
    "flow_sde": "flowgrpo_jax.sampling.sde:FLOW_SDE",
    "dance": "flowgrpo_jax.sampling.sde:DANCE",
    "flash": "flowgrpo_jax.sampling.sde:FLASH",
    "precise": "flowgrpo_jax.sampling.sde:PRECISE",
    "precise_dance": "flowgrpo_jax.sampling.sde:PRECISE_DANCE",
    "precise_flash": "flowgrpo_jax.sampling.sde:PRECISE_FLASH",
    "cps": "flowgrpo_jax.sampling.sde:CPS",
}


def load(name: str) -> Kernel:
    """Return the kernel of a row of `TABLE`, or "package.module:NAME" of the user's own."""
    return tables.check(tables.find(TABLE, name, "kernel"), Kernel, name)


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
