"""Guidance, rollout, keys and ODE, against scipy, closed forms and invariances."""

from functools import partial
from itertools import combinations, pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from flowgrpo_jax import programs, sharding
from flowgrpo_jax.sampling import sampler, sde
from flowgrpo_jax.sampling.branching import Branches
from flowgrpo_jax.sampling.sampler import ODE_KEY, SDE_KEY, Process
from flowgrpo_jax.types import Pictures

SHAPE = (4, 4, 2)
SIGMAS = tuple(sde.sigma_schedule(6).tolist())
KEY = jax.random.key(0)
IDS = jnp.array([3, 3, 3, 3, 8, 8, 8, 8])  # prompt of each image
PLACES = jnp.array([0, 1, 2, 3, 0, 1, 2, 3])  # its place in the group


def velocity(x, sigma):
    return jnp.sin(3 * x) + sigma


def by_hand(x, steps):
    """The ODE over those steps, in numpy."""
    x = np.asarray(x)
    for t in steps:
        x = x + (SIGMAS[t + 1] - SIGMAS[t]) * (np.sin(3 * x) + SIGMAS[t])
    return x


def sample(process, start, epoch=0, ids=IDS, places=PLACES):
    return compiled(process, start, epoch, ids, places)


@partial(jax.jit, static_argnums=0)
def compiled(process, start, epoch, ids, places):
    keys = sampler.image_keys(KEY, epoch, ids, places)
    x = sampler.normal(keys, ODE_KEY, SHAPE)
    return sampler.rollout(velocity, process, x, keys, start, ids)


# ---------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("sigma", [0.5, jnp.array([0.5, 0.25, 0.75])])
@pytest.mark.parametrize("scale, rows", [(1.0, 3), (0.0, 3), (4.5, 6)])
def test_guidance(scale, rows, sigma):
    """A model that answers sigma x tokens + pooled; the forward counts its rows. A scale of at
    most 1 means no guidance, as in diffusers, and images may have noise levels of their own."""
    seen = []

    def model(policy, frozen, x, sigma, text):
        assert x.shape[0] == sigma.shape[0] == text["tokens"].shape[0] == text["pooled"].shape[0]
        seen.append(x.shape[0])
        return policy * frozen * (sigma * x * text["tokens"][:, 0, 0] + text["pooled"][:, 0])

    cond = {"tokens": jnp.array([2.0, 3.0]).reshape(2, 1, 1), "pooled": jnp.array([[10.0], [20.0]])}
    empty = {"tokens": jnp.full((1, 1, 1), 5.0), "pooled": jnp.full((1, 1), 7.0)}
    x, prompt = jnp.array([1.0, 2.0, 4.0]), jnp.array([1, 0, 1])
    v = sampler.guided(model, scale)(2.0, 0.5, x, sigma, cond, empty, prompt)
    s = np.broadcast_to(sigma, 3)
    with_prompt = s * [1 * 3, 2 * 2, 4 * 3] + [20, 10, 20]
    without = s * [1 * 5, 2 * 5, 4 * 5] + 7
    wanted = without + scale * (with_prompt - without) if scale > 1 else with_prompt
    np.testing.assert_allclose(v, wanted, rtol=1e-6)
    assert seen == [rows]


# ----------------------------------------------------------------------------- rollout


@pytest.mark.parametrize("kernel", sde.TABLE)
@pytest.mark.parametrize("start", [0, 2])
def test_outside_the_window_a_rollout_is_the_ode(kernel, start):
    process = Process(SIGMAS, sde.load(kernel), window=3)
    out = sample(process, start)
    noise = sampler.normal(sampler.image_keys(KEY, 0, IDS, PLACES), ODE_KEY, SHAPE)
    assert out.x.shape == (4, 8, *SHAPE) and out.log_prob.shape == (3, 8)
    np.testing.assert_array_equal(out.prompt, IDS)
    np.testing.assert_allclose(out.x[0], by_hand(noise, range(start)), atol=1e-5)
    np.testing.assert_allclose(out.latents, by_hand(out.x[-1], range(start + 3, 6)), atol=1e-5)
    for t in range(3):  # and inside it is not
        moved = np.abs(out.x[t + 1] - by_hand(out.x[t], [start + t]))
        assert (moved.mean(axis=(1, 2, 3)) > 0.1 * SIGMAS[start + t + 1]).all()


@pytest.mark.parametrize("kernel", sde.TABLE)
def test_the_stored_latents_score_what_was_recorded(kernel):
    process = Process(SIGMAS, sde.load(kernel), window=3)
    out = sample(process, 2)
    for t, (x, x_next) in enumerate(pairwise(out.x)):
        v = velocity(x, SIGMAS[2 + t])
        again = process.transition(x, v, 2 + t, x_next=x_next).log_prob
        np.testing.assert_allclose(again, out.log_prob[t], rtol=1e-5)


M, S0 = 0.8, 0.5  # data ~ N(M, S0^2)


@pytest.mark.parametrize("kernel, noise_level, steps", [("flow_sde", 0.7, 160), ("cps", 0.1, 200)])
def test_a_rollout_ends_on_the_data(kernel, noise_level, steps):
    """8192 draws against N(M, S0^2): one wrong, shared or repeated noise and they do not fit."""
    keys = sampler.image_keys(KEY, 0, jnp.zeros(64, jnp.int32), jnp.arange(64))

    def exact(x, sigma):
        variance = (1 - sigma) ** 2 * S0**2 + sigma**2
        return -M + (sigma - (1 - sigma) * S0**2) / variance * (x - (1 - sigma) * M)

    @jax.jit
    def end():
        sigmas = tuple(np.linspace(1, 0, steps + 1))
        process = Process(sigmas, sde.load(kernel), noise_level, window=steps)
        x = sampler.normal(keys, ODE_KEY, (8, 16, 1))
        return sampler.rollout(exact, process, x, keys, 0, keys).latents

    assert kstest((np.asarray(end()).ravel() - M) / S0, "norm").pvalue > 1e-3


def test_without_a_window_a_rollout_is_the_ode():
    out = sample(Process(SIGMAS), 0)
    noise = sampler.normal(sampler.image_keys(KEY, 0, IDS, PLACES), ODE_KEY, SHAPE)
    np.testing.assert_allclose(out.latents, by_hand(noise, range(6)), atol=1e-5)
    assert out.x.shape == (1, 8, *SHAPE) and out.log_prob.shape == (0, 8)


# -------------------------------------------------------------------------------- keys


def test_every_image_and_every_step_has_its_own_noise():
    keys = sampler.image_keys(KEY, 0, IDS, PLACES)
    other = sampler.image_keys(KEY, 1, IDS, PLACES)
    noise = [sampler.normal(k, f, SHAPE) for k in (keys, other) for f in (ODE_KEY, SDE_KEY, 2, 3)]
    flat = np.concatenate(noise).reshape(64, -1)
    assert kstest(flat.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(flat) - np.eye(64)).max() < 0.75  # 32 numbers each: 4.5 sigma


def test_an_image_is_the_same_in_whatever_batch_it_is_drawn():
    process = Process(SIGMAS, sde.CPS, window=3)
    whole = sample(process, 1)
    for size in (2, 4):
        for i in range(0, 8, size):
            part = slice(i, i + size)
            out = sample(process, 1, ids=IDS[part], places=PLACES[part])
            np.testing.assert_allclose(out.latents, whole.latents[part], atol=1e-6)
            np.testing.assert_allclose(out.log_prob, whole.log_prob[:, part], atol=1e-5)
    order = jnp.array([5, 0, 7, 2, 1, 6, 3, 4])
    out = sample(process, 1, ids=IDS[order], places=PLACES[order])
    np.testing.assert_allclose(out.latents, whole.latents[order], atol=1e-6)


def test_epochs_differ():
    process = Process(SIGMAS, sde.CPS, window=3)
    first, again, second = (sample(process, 1, epoch=e) for e in (0, 0, 1))
    np.testing.assert_array_equal(first.latents, again.latents)
    assert (np.abs(first.latents - second.latents).mean(axis=(1, 2, 3)) > 0.1).all()


# --------------------------------------------------------------------------------- ODE


def test_the_ode_converges_with_order_one():
    """dx / dsigma = 2 sigma x, so that x(0) = x(1) / e."""
    x = jnp.linspace(-2, 2, 5).reshape(5, 1, 1, 1)

    def error(steps):
        end = sampler.ode(lambda x, sigma: 2 * sigma * x, np.linspace(1, 0, steps + 1), x)
        return float(jnp.abs(end - x / np.e).max())

    errors = [error(n) for n in (32, 64, 128)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1, atol=0.1)


def test_the_ode_is_exact_for_a_straight_path():
    """Noise x_1 flowing to one datum moves along a line: any schedule lands on it."""
    x_1, datum = np.random.default_rng(0).normal(size=(2, 3, *SHAPE)).astype(np.float32)
    end = sampler.ode(lambda x, sigma: (x - datum) / sigma, SIGMAS, x_1)
    np.testing.assert_allclose(end, datum, atol=1e-4)


@pytest.mark.parametrize("same_noise", [False, True])
def test_a_group_may_start_from_the_same_noise(same_noise):
    """Its images then differ by the transitions' noise alone; other prompts' start elsewhere."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    run = programs.sample(
        sampler.guided(lambda policy, frozen, x, sigma, text: x - 1, 1.0),
        lambda vae, latents: Pictures(latents, jnp.ones(4, bool)),
        mesh,
        Process(SIGMAS, sde.CPS, window=2, branches=Branches(2 if same_noise else 1)),
        latent=(2, 2, 1),
        score=None,
    )
    cond = {"text": jnp.zeros((2, 1))}
    weights = {"transformer": {}, "vae": {}}
    ids, images = jnp.array([3, 3, 5, 5]), jnp.array([0, 1, 0, 1])
    rollout, _, _ = run({}, weights, cond, cond, KEY, 0, 0, ids, ids // 5, images)
    first, last = rollout.x[0], rollout.latents
    for a, b in combinations(range(4), 2):
        together = same_noise and ids[a] == ids[b]
        assert bool((first[a] == first[b]).all()) == together
        assert (last[a] != last[b]).any()
