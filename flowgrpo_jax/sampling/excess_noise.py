"""Excess noise: how much more noise than its sigma a step of a kernel leaves in the picture.

A step to sigma' should leave noise of standard deviation sigma'. Where it leaves more, the model
sees a noise level that it was not told, and pictures come out grainy.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.sampling.sde import Kernel
from flowgrpo_jax.sampling.windows import Window

MOST = 1.1  # times the noise that a step should leave, from which on there is a warning
EXACT = {"flow_sde": "precise", "dance": "precise_dance", "flash": "precise_flash"}


def ratios(kernel: Kernel, sigmas: Sequence[float] | np.ndarray, noise_level: float) -> np.ndarray:
    """Return the noise that each step leaves, over its sigma', f64 [T - 1].

    The step begins with the noise sigma, and the velocity is exact. The noise after it then has
    the variance c^2 + std^2, c being what the kernel's mean keeps of the noise before: the mean
    for the picture 0 and noise 1. The last step is left out, because no noise should be left.
    """

    def after(sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
        x = jnp.full((1, 1, 1, 1), sigma)
        mean, std = kernel.gaussian(
            x,
            jnp.ones_like(x),
            sigma,
            sigma_next,
            noise_level=noise_level,
            sigma_max=float(sigmas[1]),
        )
        return jnp.hypot(mean.reshape(()), std)

    steps = jnp.asarray(sigmas[:-1], jnp.float32)
    left = jax.jit(jax.vmap(after))(steps[:-1], steps[1:])
    return np.asarray(left, np.float64) / np.asarray(sigmas[1:-1], np.float64)


def warning(name: str, process: Process, window: Window) -> str:
    """Return a sentence about the window's steps that leave more than `MOST`, or "".

    Args:
      name: the kernel's name in the recipe.
    """
    if not window.size:  # the ODE, without noise
        return ""
    sigmas = process.sigmas
    found = ratios(process.kernel, sigmas, process.noise_level)
    steps = [t for t in range(window.low, window.high) if found[t] > MOST]
    if not steps:
        return ""
    worst = max(steps, key=lambda t: found[t])
    fix = f"take sample.kernel={EXACT.get(name, 'precise')!r}, which leaves exactly its sigma"
    if steps[0] > window.low:
        fix = f"end the window before step {steps[0]} (sample.window_range), or {fix}"
    return (
        f"sample.kernel={name!r} with sample.noise_level={process.noise_level:g} leaves"
        f" {found[worst]:.3g} times the noise that step {worst} should leave (sigma"
        f" {sigmas[worst]:.3g} to {sigmas[worst + 1]:.3g}), and more than {MOST:g} times at step"
        f"{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))} of the window: {fix}"
    )
