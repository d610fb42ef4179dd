"""Schedule, kernels, log-prob and KL, against published values, scipy and the papers' formulas."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from flowgrpo_jax.sampling import sde

KERNELS = tuple(sde.TABLE)
SIGMAS = sde.sigma_schedule(10)
SHAPE = (3, 4, 4, 2)

# At 10 steps and shift 3, worked out apart from this code.
FLOW_SDE_STD = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.006]  # a = 0.7
CPS_STD = [0.913, 0.869, 0.816, 0.752, 0.673, 0.573, 0.442, 0.264, 0.0085, 0.0]  # eta = 0.8
DANCE_STD = {0: 0.060, 1: 0.065, 2: 0.071, 4: 0.087, 6: 0.111, 7: 0.130, 8: 0.156}  # eta = 0.3
PRECISE_STD = {0: 0.960, 1: 0.527, 2: 0.420, 4: 0.313, 6: 0.227, 7: 0.159, 8: 0.0082, 9: 0}  # 0.7
EXACT = {"precise": "flow_sde", "precise_dance": "dance", "precise_flash": "flash"}


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
    "kernel, noise_level, table",
    [
        ("flow_sde", 0.7, dict(enumerate(FLOW_SDE_STD))),
        ("cps", 0.8, dict(enumerate(CPS_STD))),
        ("dance", 0.3, DANCE_STD),
        ("precise", 0.7, PRECISE_STD),
    ],
)
def test_std_of_every_step(kernel, noise_level, table):
    stds = [step(kernel, jnp.zeros(1), jnp.zeros(1), i, noise_level).std for i in table]
    np.testing.assert_allclose(stds, list(table.values()), atol=6e-4)


def test_flash_has_the_diffusion_of_its_published_table():
    """The ten weights 1 / (sqrt(h) / g + g sqrt(h) (1 - sigma) / (2 sigma)) in Flash-GRPO's script,
    on its grid of 20 steps with shift 3."""
    published = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    u = 1 - np.linspace(1, 1 / 1000, 21)[:0:-1]
    sigmas = np.append(3 * u / (1 + 2 * u), 0).astype(np.float32)
    for i, weight in enumerate(published):
        root_h = np.sqrt(sigmas[i] - sigmas[i + 1])
        g = step("flash", jnp.zeros(1), jnp.zeros(1), i, 1.0, sigmas).std / root_h
        ours = 1 / (root_h / g + g * root_h * (1 - sigmas[i]) / (2 * sigmas[i]))
        np.testing.assert_allclose(ours, weight, rtol=2e-4)


@pytest.mark.parametrize("i", range(10))
def test_dance_is_the_papers_step(i):
    """Drift v + eta^2 / 2 (x - (1 - sigma) x_0) / sigma^2, arXiv 2505.07818, in f64."""
    x, v = (a.astype(np.float64) for a in normals(2))
    sigma, h, eta = SIGMAS[i].astype(float), float(SIGMAS[i] - SIGMAS[i + 1]), 0.3
    score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
    mean, std = step("dance", x, v, i, eta)
    # At the last but one sigma, 0.0089, the drift is 30 times x.
    np.testing.assert_allclose(mean, x - (v - eta**2 / 2 * score) * h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(std, eta * np.sqrt(h), rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("i", range(10))
def test_without_noise_a_step_is_the_ode(kernel, i):
    x, v = normals(2)
    mean, std = step(kernel, x, v, i, 0.0)
    assert std == 0
    np.testing.assert_allclose(mean, sde.euler(x, v, *SIGMAS[i : i + 2]), atol=1e-6)


def at_one_point(kernel, sigma, sigma_next, noise_level, sigma_max, m=1.5):
    """A step for data at one point m, whose velocity is exact: (the mean for noise 0, what the mean
    keeps of the noise, std)."""

    def mean_of(x_1):
        x, v = (1 - sigma) * m + sigma * x_1, x_1 - m
        at = dict(noise_level=noise_level, sigma_max=sigma_max)
        return sde.load(kernel).gaussian(x, v, sigma, sigma_next, **at)

    (centre, std), (shifted, _) = mean_of(0.0), mean_of(1.0)
    return float(centre), float(shifted - centre), float(std)


@pytest.mark.parametrize("kernel", ["cps", *EXACT])
@pytest.mark.parametrize("noise_level", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("i", range(10))
def test_an_exact_kernel_leaves_exactly_the_noise_that_the_next_sigma_holds(kernel, noise_level, i):
    """x' = (1 - sigma') m + sigma' N(0, 1)."""
    sigma, sigma_next = SIGMAS[i], SIGMAS[i + 1]
    centre, kept, std = at_one_point(kernel, sigma, sigma_next, noise_level, SIGMAS[1])
    np.testing.assert_allclose(centre, (1 - sigma_next) * 1.5, atol=1e-6)
    np.testing.assert_allclose(np.hypot(kept, std), sigma_next, atol=1e-6)


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("i", [2, 5, 8])
def test_an_exact_step_is_the_limit_of_many_small_ones(kernel, i):
    """One step of PRECISE against 4000 Euler-Maruyama steps of the same SDE, equally long in log
    sigma. For data at 0 the picture is its noise x, and the velocity x / sigma."""
    sigma, sigma_next = map(float, SIGMAS[i : i + 2])
    kept, variance = sigma, 0.0
    for s, after in pairwise(np.geomspace(sigma, sigma_next, 4001)):
        factor, std = in_numpy(EXACT[kernel], 1.0, 1 / s, s, after, noise_level=0.7, sigma_max=0.98)
        kept, variance = factor * kept, factor**2 * variance + std**2
    _, exact_kept, exact_std = at_one_point(kernel, sigma, sigma_next, 0.7, 0.98)
    np.testing.assert_allclose(exact_std, np.sqrt(variance), rtol=1e-2)
    np.testing.assert_allclose(exact_kept, kept, rtol=1e-2, atol=1e-6)


def in_numpy(kernel, x, v, s, after, *, noise_level, sigma_max):
    """The Euler-Maruyama step in f64, with g as the papers write it."""
    g = {
        "flow_sde": noise_level * np.sqrt(s / (1 - s)),
        "dance": noise_level,
        "flash": noise_level * sigma_max * s,
    }[kernel]
    h = s - after
    return x - (v + g**2 / (2 * s) * (x + (1 - s) * v)) * h, g * np.sqrt(h)


@pytest.mark.parametrize(
    "kernel, g_over_sigma",
    [
        ("precise", lambda u: 0.7 / np.sqrt(u * (1 - u))),
        ("precise_dance", lambda u: 0.7 / u),
        ("precise_flash", lambda u: 0.7 * SIGMAS[1]),
    ],
)
@pytest.mark.parametrize("i", range(1, 9))
def test_the_noise_that_an_exact_step_keeps_is_the_integral(kernel, g_over_sigma, i):
    sigma, sigma_next = map(float, SIGMAS[i : i + 2])
    integral = quad(lambda u: g_over_sigma(u) ** 2, sigma_next, sigma)[0]
    _, kept, _ = at_one_point(kernel, sigma, sigma_next, 0.7, SIGMAS[1])
    np.testing.assert_allclose(kept, sigma_next * np.exp(-integral / 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", EXACT)
def test_two_exact_steps_are_one(kernel):
    """For data at one point: an SDE's law does not depend on where it is looked at."""
    at = [at_one_point(kernel, s, n, 0.5, 0.96) for s, n in ((0.9, 0.6), (0.6, 0.2), (0.9, 0.2))]
    (_, first, std_first), (_, second, std_second), (_, whole, std_whole) = at
    np.testing.assert_allclose(second * first / 0.6, whole, rtol=1e-4)
    np.testing.assert_allclose(np.hypot(std_second, second * std_first / 0.6), std_whole, rtol=1e-5)


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
