"""Schedule, kernels, log-prob and KL, against published values, scipy and exact Gaussian flows."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from flowgrpo_jax import sde

KERNELS = tuple(sde.TABLE)
SIGMAS = sde.sigma_schedule(10)
SHAPE = (3, 4, 4, 2)

# At 10 steps and shift 3, worked out apart from this code.
FLOW_SDE_STD = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.006]  # a = 0.7
CPS_STD = [0.913, 0.869, 0.816, 0.752, 0.673, 0.573, 0.442, 0.264, 0.0085, 0.0]  # eta = 0.8


def step(kernel, x, v, i, noise_level, sigmas=SIGMAS):
    return sde.load(kernel).gaussian(
        x, v, sigmas[i], sigmas[i + 1], noise_level=noise_level, sigma_max=sigmas[1]
    )


def normals(count, shape=SHAPE):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)


# ---------------------------------------------------------------------------- schedule


def test_schedule_is_that_of_the_published_checkpoints():
    ten = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    np.testing.assert_allclose(SIGMAS, ten, atol=6e-5)
    forty = sde.sigma_schedule(40)
    assert forty.shape == (41,) and forty.dtype == np.float32
    np.testing.assert_allclose(forty[:5], [1, 0.99133, 0.98236, 0.97306, 0.96342], atol=6e-6)
    np.testing.assert_allclose(forty[-5:], [0.20620, 0.14651, 0.08105, 0.00893, 0], atol=6e-6)


def test_schedule_without_shift_is_even():
    np.testing.assert_allclose(sde.sigma_schedule(4, 1.0, 10), [1, 0.7, 0.4, 0.1, 0], atol=1e-6)


def test_schedule_needs_a_step():
    with pytest.raises(ValueError, match="steps=0"):
        sde.sigma_schedule(0)


# ----------------------------------------------------------------------------- kernels


@pytest.mark.parametrize(
    "kernel, noise_level, table", [("flow_sde", 0.7, FLOW_SDE_STD), ("cps", 0.8, CPS_STD)]
)
def test_std_of_every_step(kernel, noise_level, table):
    stds = [step(kernel, jnp.zeros(1), jnp.zeros(1), i, noise_level).std for i in range(10)]
    np.testing.assert_allclose(stds, table, atol=6e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("i", range(10))
def test_without_noise_a_step_is_the_ode(kernel, i):
    x, v = normals(2)
    mean, std = step(kernel, x, v, i, 0.0)
    assert std == 0
    np.testing.assert_allclose(mean, sde.euler(x, v, *SIGMAS[i : i + 2]), atol=1e-6)


@pytest.mark.parametrize("noise_level", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("i", range(10))
def test_cps_leaves_exactly_the_noise_that_the_next_sigma_holds(noise_level, i):
    """For data at one point m the velocity is exact, so x' = (1 - sigma') m + sigma' N(0, 1)."""
    m, sigma, sigma_next = 1.5, SIGMAS[i], SIGMAS[i + 1]

    def mean_of(x_1):
        mean, std = step("cps", (1 - sigma) * m + sigma * x_1, x_1 - m, i, noise_level)
        return float(mean), float(std)

    (centre, std), (shifted, _) = mean_of(0.0), mean_of(1.0)
    np.testing.assert_allclose(centre, (1 - sigma_next) * m, atol=1e-6)
    np.testing.assert_allclose(np.hypot(shifted - centre, std), sigma_next, atol=1e-6)


# ----------------------------------------------------- many steps keep a Gaussian's marginals

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


def test_flow_sde_converges_to_the_marginals_with_order_one():
    """Away from sigma = 1, where the diffusion is singular, Euler-Maruyama has weak order 1."""
    errors = [final_error("flow_sde", n, 0.7, first=0.8) for n in (20, 40, 80)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1, atol=0.15)


def test_cps_converges_to_the_marginals_with_order_one():
    """Its noise is a fraction of sigma' per step: the limit is one of equal noise per unit time."""
    errors = [final_error("cps", n, 1.5 / np.sqrt(n), first=1.0) for n in (20, 40, 80)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1, atol=0.15)


def test_flow_sde_from_pure_noise_falls_to_the_marginals():
    errors = [final_error("flow_sde", n, 0.7, first=1.0) for n in (10, 40, 160)]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1] and errors[2] < 0.01


# ---------------------------------------------------------------------- log-prob and KL


@pytest.mark.parametrize("reduction", sde.REDUCTIONS)
def test_log_prob_is_the_normal_density(reduction):
    x, mean = normals(2)
    expected = getattr(norm.logpdf(x, mean, 0.3), reduction)(axis=(1, 2, 3))
    np.testing.assert_allclose(sde.log_prob(x, mean, 0.3, reduction=reduction), expected, rtol=1e-5)


@pytest.mark.parametrize("reduction", sde.REDUCTIONS)
def test_squared_error_is_the_density_without_its_constants(reduction):
    """Differences of it are those of the true log-density times 2 std^2."""
    x, y, mean = normals(3)
    true = norm.logpdf(x, mean, 0.3) - norm.logpdf(y, mean, 0.3)
    score = [
        sde.log_prob(z, mean, 0.3, density="squared_error", reduction=reduction) for z in (x, y)
    ]
    expected = 2 * 0.3**2 * getattr(true, reduction)(axis=(1, 2, 3))
    np.testing.assert_allclose(score[0] - score[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_transition_is_drawn_and_scored_alike(kernel):
    x, v, noise = normals(3)
    at = dict(noise_level=0.7, sigma_max=SIGMAS[1])
    drawn = sde.transition(sde.load(kernel), x, v, *SIGMAS[3:5], noise=noise, **at)
    scored = sde.transition(sde.load(kernel), x, v, *SIGMAS[3:5], x_next=drawn.x_next, **at)
    density = norm.logpdf(noise) - np.log(drawn.std)  # of x' as a change of variables
    np.testing.assert_allclose(drawn.log_prob, density.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(scored.log_prob, drawn.log_prob)
    np.testing.assert_array_equal(scored.x_next, drawn.x_next)
    with pytest.raises(ValueError, match="noise"):
        sde.transition(sde.load(kernel), x, v, *SIGMAS[3:5], **at)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_drawn_transition_is_a_constant_to_the_gradient(kernel):
    """If it were not, moving the mean would move x' with it and log p would never change."""
    x, v, noise = normals(3)

    def draw(v):
        return sde.transition(
            sde.load(kernel), x, v, *SIGMAS[3:5], noise_level=0.7, sigma_max=SIGMAS[1], noise=noise
        )

    assert not jax.grad(lambda v: draw(v).x_next.sum())(v).any()
    assert jax.grad(lambda v: draw(v).log_prob.sum())(v).any()


@pytest.mark.parametrize("reduction", sde.REDUCTIONS)
def test_kl_is_the_integral(reduction):
    means, refs, std = [0.0, 0.5, -1.0], [0.2, 0.5, 1.0], 0.6

    def one(m, r):
        p, q = norm(m, std), norm(r, std)
        return quad(lambda y: p.pdf(y) * (p.logpdf(y) - q.logpdf(y)), -9, 9)[0]

    expected = getattr(np.array([one(m, r) for m, r in zip(means, refs)]), reduction)()
    ours = sde.kl(jnp.array([means]), jnp.array([refs]), std, -0.1, reduction=reduction)
    np.testing.assert_allclose(ours, [expected], rtol=1e-5)


@pytest.mark.parametrize("i", range(10))
def test_kl_of_flow_sde_is_the_papers_closed_form(i):
    """|dt| / 2 (s (1 - sigma) / (2 sigma) + 1 / s)^2 |v - v_ref|^2, arXiv 2505.05470."""
    (x, v, v_ref), a = normals(3), 0.7
    sigma, dt = SIGMAS[i], SIGMAS[i + 1] - SIGMAS[i]
    s = a * np.sqrt(sigma / (1 - min(sigma, SIGMAS[1])))
    (mean, std), (ref, _) = (step("flow_sde", x, u, i, a) for u in (v, v_ref))
    weight = -dt / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2
    expected = weight * np.square(v - v_ref).mean((1, 2, 3))
    np.testing.assert_allclose(sde.kl(mean, ref, std, dt), expected, rtol=1e-3)


@pytest.mark.parametrize("reduction", sde.REDUCTIONS)
def test_kl_without_dt_is_the_kl_per_unit_time(reduction):
    mean, ref = normals(2)
    exact, no_dt = (
        sde.kl(mean, ref, 0.3, -0.04, weighting=w, reduction=reduction) for w in sde.KL_WEIGHTINGS
    )
    np.testing.assert_allclose(no_dt, 0.04 * exact, rtol=1e-5)
