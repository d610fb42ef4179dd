"""Solvers of the ODE against diffusers, a closed form, and in rollouts with a window."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.sampling import sampler, sde, solvers, tails
from flowgrpo_jax.sampling.sampler import ODE_KEY, Process

M, S0 = 0.8, 0.5  # data ~ N(M, S0^2)


def velocity(x, sigma):
    """E[x_1 - x_0 | x_sigma = x] of that data."""
    variance = (1 - sigma) ** 2 * S0**2 + sigma**2
    return -M + (sigma - (1 - sigma) * S0**2) / variance * (x - (1 - sigma) * M)


def solution(x, sigma, sigma_next):
    """The ODE's: Gaussians stay Gaussian, and every quantile moves with its distribution."""
    std = [np.sqrt((1 - s) ** 2 * S0**2 + s**2) for s in (sigma, sigma_next)]
    return (1 - sigma_next) * M + std[1] / std[0] * (x - (1 - sigma) * M)


def noise(shape=(2, 3, 3, 1)):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# --------------------------------------------------------------------------- DPM-Solver++


def by_diffusers(sigmas, x, v):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.from_numpy(np.asarray(sigmas, np.float32))
    x = torch.from_numpy(x)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(v(x, sigma), t, x, return_dict=False)[0]
    return x.numpy()


@pytest.mark.parametrize("steps", [2, 3, 10, 25])
def test_it_is_diffusers(steps):
    """On SD3's schedule, with its infinite log-SNR at both ends, for a velocity that is no ODE's
    with a simple solution."""
    sigmas = sde.sigma_schedule(steps)
    theirs = by_diffusers(sigmas, noise(), lambda x, sigma: x * sigma + (3 * x).sin())
    ours = sampler.ode(
        lambda x, sigma: x * sigma + jnp.sin(3 * x), sigmas, noise(), solvers.DPMPP_2M
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_it_is_diffusers_on_its_own_schedule():
    """Which begins a little below 1."""
    u = 1 - np.linspace(1, 1 / 1000, 9)[:0:-1]
    sigmas = np.append(3 * u / (1 + 2 * u), 0)
    theirs = by_diffusers(sigmas, noise(), lambda x, sigma: x * sigma - 1)
    ours = sampler.ode(lambda x, sigma: x * sigma - 1, sigmas, noise(), solvers.DPMPP_2M)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, order", [("euler", 1), ("dpmpp_2m", 2)])
def test_the_order_of_convergence(name, order):
    x = noise()

    def error(steps):
        sigmas = np.linspace(0.9, 0.1, steps + 1)
        end = sampler.ode(velocity, sigmas, x, solvers.load(name))
        return float(np.abs(end - solution(x, 0.9, 0.1)).max())

    errors = [error(n) for n in (16, 32, 64)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.2)


@pytest.mark.parametrize("name", solvers.TABLE)
def test_a_constant_velocity_is_followed_exactly(name):
    x = noise()
    end = sampler.ode(
        lambda x, s: jnp.full_like(x, 2.5), sde.sigma_schedule(5), x, solvers.load(name)
    )
    np.testing.assert_allclose(end, x - 2.5, atol=1e-5)


@pytest.mark.parametrize("name", solvers.TABLE)
def test_one_datum_is_reached_from_any_noise(name):
    datum = noise()[::-1]
    sigmas = sde.sigma_schedule(4)
    end = sampler.ode(lambda x, s: (x - datum) / s, sigmas, noise(), solvers.load(name))
    np.testing.assert_allclose(end, datum, atol=1e-5)


def test_two_steps_are_the_first_order():
    """The step from sigma = 1 has nothing before it, and the step to 0 is infinitely long."""
    ends = [
        sampler.ode(velocity, (1.0, 0.6, 0.0), noise(), s)
        for s in (solvers.EULER, solvers.DPMPP_2M)
    ]
    np.testing.assert_array_equal(*ends)


def test_an_unknown_solver():
    with pytest.raises(ValueError, match=r"solver 'heun' is unknown: choose from dpmpp_2m, euler"):
        solvers.load("heun")


# ------------------------------------------------------------------------------ in a rollout

SIGMAS = tuple(sde.sigma_schedule(8).tolist())
IDS, PLACES = jnp.array([3, 3, 8, 8]), jnp.array([0, 1, 0, 1])
SHAPE = (2, 2, 1)


@partial(jax.jit, static_argnums=0)
def sample(process, start):
    keys = sampler.image_keys(jax.random.key(0), 0, IDS, PLACES)
    x = sampler.normal(keys, ODE_KEY, SHAPE)
    return sampler.rollout(velocity, process, x, keys, start, IDS)


def by_hand(x, x_0, sigmas):
    """DPM-Solver++ (2M) as the paper writes it, from x with the last prediction x_0, in f64."""
    x, before = np.asarray(x, float), x_0
    snr = [np.inf if s == 0 else np.log((1 - s) / s) if s < 1 else -np.inf for s in sigmas]
    for i in range(1, len(sigmas) - 1):
        sigma, after = sigmas[i], sigmas[i + 1]
        x_0 = x - sigma * velocity(x, sigma)
        h, h_before = snr[i + 1] - snr[i], snr[i] - snr[i - 1]
        ratio = 0 if after == 0 else h / (2 * h_before)
        d = (1 + ratio) * x_0 - ratio * before
        x = after / sigma * x - (1 - after) * np.expm1(-h) * d
        before = x_0
    return x


@pytest.mark.parametrize("start", [0, 3])
def test_after_the_window_a_solver_goes_on_from_its_last_prediction(start):
    process = Process(SIGMAS, sde.CPS, window=3, solver=solvers.DPMPP_2M)
    out, last = sample(process, start), start + 2
    x_0 = out.x[2] - SIGMAS[last] * velocity(out.x[2], SIGMAS[last])
    ours = by_hand(out.x[-1], np.asarray(x_0, float), SIGMAS[last:])
    np.testing.assert_allclose(out.latents, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0, 3])
def test_the_windows_transitions_are_the_kernels_whatever_the_solver(start):
    """Bit for bit, so that the update scores what was drawn."""
    for by_start in ((), tails.compressed(SIGMAS, 3.0, 3, 0.6)):
        process = Process(SIGMAS, sde.CPS, window=3, solver=solvers.DPMPP_2M, by_start=by_start)
        out = sample(process, start)
        scored = [
            process.transition(
                out.x[t], velocity(out.x[t], SIGMAS[start + t]), start + t, x_next=out.x[t + 1]
            ).log_prob
            for t in range(3)
        ]
        np.testing.assert_allclose(out.log_prob, scored, rtol=1e-5)


@pytest.mark.parametrize("solver", solvers.TABLE)
@pytest.mark.parametrize("start", [0, 2, 4])
def test_a_compressed_tail_is_the_ode_on_fewer_steps(start, solver):
    """Up to the window's end the rollout is the same, bit for bit."""
    table = tails.compressed(SIGMAS, 3.0, 3, 0.6)
    whole = Process(SIGMAS, sde.CPS, window=3, solver=solvers.load(solver))
    short = Process(SIGMAS, sde.CPS, window=3, solver=solvers.load(solver), by_start=table)
    out, expected = sample(short, start), sample(whole, start)
    np.testing.assert_array_equal(out.x, expected.x)
    np.testing.assert_array_equal(out.log_prob, expected.log_prob)
    sigmas = (*np.trim_zeros(table[start], "b"), 0.0)
    tail = sigmas[start + 3 :]
    assert len(tail) < len(SIGMAS[start + 3 :]) or len(tail) == 2
    if solver == "euler":
        ours = sampler.ode(velocity, tail, out.x[-1])
    else:
        sigma = SIGMAS[start + 2]
        x_0 = out.x[2] - sigma * velocity(out.x[2], sigma)
        ours = by_hand(out.x[-1], np.asarray(x_0, float), sigmas[start + 2 :])
    np.testing.assert_allclose(out.latents, ours, rtol=1e-4, atol=1e-5)


def test_steps_beyond_a_short_schedule_are_not_computed():
    """A velocity that would poison everything at sigma 0 is never asked there."""
    asked = []

    def watched(x, sigma):
        jax.debug.callback(lambda s: asked.append(float(s)), sigma)
        return velocity(x, sigma)

    table = tails.compressed(SIGMAS, 3.0, 2, 0.5)
    process = Process(SIGMAS, sde.CPS, window=2, by_start=table)
    keys = sampler.image_keys(jax.random.key(0), 0, IDS, PLACES)
    x = sampler.normal(keys, ODE_KEY, SHAPE)
    jax.block_until_ready(sampler.rollout(watched, process, x, keys, 0, IDS))
    jax.effects_barrier()
    wanted = np.trim_zeros(np.asarray(table[0], np.float32), "b")
    np.testing.assert_array_equal(asked, wanted)
    assert len(table[0]) - 1 > len(wanted)
