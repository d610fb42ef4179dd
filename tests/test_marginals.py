"""Many steps of a kernel keep the marginals of an exact Gaussian flow."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.sampling import sde

M, S0 = 0.8, 0.5  # data ~ N(M, S0^2)


def gaussian_velocity(x, sigma):
    """E[x_1 - x_0 | x_sigma = x], from the joint normal of (x_1 - x_0, x_sigma)."""
    variance = (1 - sigma) ** 2 * S0**2 + sigma**2
    return -M + (sigma - (1 - sigma) * S0**2) / variance * (x - (1 - sigma) * M)


def final_error(kernel, steps, noise_level, first):
    """|mean - M| + |std - S0| at the end of the SDE, without sampling: a step is affine in x."""
    sigmas = np.linspace(first, 0, steps + 1)
    mean, variance = (1 - first) * M, (1 - first) ** 2 * S0**2 + first**2
    for sigma, sigma_next in pairwise(sigmas):
        x = np.array([0.0, 1.0])
        (offset, end), std = sde.load(kernel).gaussian(
            x,
            gaussian_velocity(x, sigma),
            sigma,
            sigma_next,
            noise_level=noise_level,
            sigma_max=sigmas[1] if first == 1 else 1.0,
        )
        slope = end - offset
        mean, variance = offset + slope * mean, slope**2 * variance + std**2
    return float(abs(mean - M) + abs(jnp.sqrt(variance) - S0))


@pytest.mark.parametrize("kernel", ["flow_sde", "flash", "precise", "precise_flash"])
def test_a_kernel_converges_to_the_marginals_with_order_one(kernel):
    """Away from sigma = 1, where the diffusion of `flow_sde` is singular, weak order 1."""
    errors = [final_error(kernel, n, 0.7, first=0.8) for n in (20, 40, 80)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1, atol=0.15)


@pytest.mark.parametrize("kernel", ["dance", "precise_dance"])
def test_dances_diffusion_converges_to_the_marginals(kernel):
    """With a lower order, because it does not vanish with sigma: near 0 it swamps the picture."""
    errors = [final_error(kernel, n, 0.3, first=0.8) for n in (40, 160, 640)]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1] and errors[2] < 0.01


def test_cps_converges_to_the_marginals_with_order_one():
    """Its noise is a fraction of sigma' per step: the limit is one of equal noise per unit time."""
    errors = [final_error("cps", n, 1.5 / np.sqrt(n), first=1.0) for n in (20, 40, 80)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1, atol=0.15)


def test_flow_sde_from_pure_noise_falls_to_the_marginals():
    errors = [final_error("flow_sde", n, 0.7, first=1.0) for n in (10, 40, 160)]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1] and errors[2] < 0.01


@pytest.mark.parametrize("i", [1, 4, 8])
def test_the_exact_step_at_the_root_of_two_is_ddim_with_eta_1(i):
    """DDPO's sampler, of a model that keeps the variance, at the same signal-to-noise ratios."""
    sigma, after = (float(s) for s in sde.sigma_schedule(10)[i : i + 2])
    scale, scale_after = (np.hypot(1 - s, s) for s in (sigma, after))
    alpha, alpha_after = ((1 - sigma) / scale) ** 2, ((1 - after) / scale_after) ** 2  # cumulated
    x, v = np.random.default_rng(i).normal(size=(2, 5))
    image, noise = x - sigma * v, x + (1 - sigma) * v
    std = np.sqrt((1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after))
    mean = np.sqrt(alpha_after) * image + np.sqrt(1 - alpha_after - std**2) * noise
    found = sde.PRECISE.gaussian(x, v, sigma, after, noise_level=np.sqrt(2), sigma_max=None)
    np.testing.assert_allclose(found.mean, scale_after * mean, atol=1e-6)
    np.testing.assert_allclose(found.std, scale_after * std, rtol=1e-4)
