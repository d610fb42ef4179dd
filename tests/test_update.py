"""The gradient of an update, against scipy, finite differences and invariances."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grpo_update import KL, SIGMAS, grpo, start
from linear_policy import IMAGES, KEY, SHAPE, close, draw, weights
from scipy.optimize import approx_fprime
from scipy.stats import norm

from flowgrpo_jax import advantages, sharding, update
from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.sampling import sampler, sde
from flowgrpo_jax.sampling.sampler import ODE_KEY, Process
from flowgrpo_jax.types import Credit, Rollout

PLACES = jnp.arange(IMAGES, dtype=jnp.int32)
ADVANTAGE = jnp.linspace(-2, 1, IMAGES)


def linear(params, x, sigma):
    """A velocity with a 3 x 3 matrix and a bias."""
    return x @ params["w"] + sigma * params["b"]


@partial(jax.jit, static_argnums=(0, 1))
def share(process, algorithm, params, reference, rollout, advantage, terms, carry):
    """One micro-batch's gradient and figures of an update of IMAGES images, added to `carry`."""
    setup, others = Setup(process, IMAGES), {"reference": reference}
    return update.accumulate(
        algorithm, setup, linear, params, others, rollout, Credit(advantage), terms, IMAGES, carry
    )


CPS = Process(SIGMAS, sde.CPS, 0.8, window=3)


def linear_share(params, rollout, advantage=ADVANTAGE, terms=(0, 1, 2), carry=None):
    carry = carry or update.empty(KL, Setup(CPS, IMAGES), params)
    terms = jnp.array(terms)
    return share(CPS, KL, params, weights(1), rollout, advantage, terms, carry)


@pytest.fixture(scope="module")
def rolled():
    """A rollout of weights(0), to be replayed with others."""
    return jax.jit(lambda: draw(partial(linear, weights(0)), CPS))()


# ----------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize(
    "kernel, weighting", [("flow_sde", "exact"), ("flow_sde", "no_dt"), ("cps", "exact")]
)
@pytest.mark.parametrize("reduction", sde.REDUCTIONS)
def test_gradient_by_finite_differences_of_scipys_densities(kernel, weighting, reduction):
    """The loss is written anew on scipy's normal density; float64, off policy, nothing clipped."""
    rng = np.random.default_rng(0)
    process = Process(SIGMAS, sde.load(kernel), 0.7, window=1, reduction=reduction)
    algorithm = grpo(1e3, kl_beta=0.3, kl_weighting=weighting)
    step, dt = 2, SIGMAS[3] - SIGMAS[2]
    with jax.enable_x64(True):
        theta, theta_ref = rng.normal(scale=0.3, size=(2, 12))
        x, noise = rng.normal(size=(2, 2, 1, 2, 3))
        advantage = np.array([1.5, -0.5])

        def params(t):
            return {"w": jnp.asarray(t[:9].reshape(3, 3)), "b": jnp.asarray(t[9:])}

        def gaussian(t):
            v = linear(params(t), x, np.float32(SIGMAS[step]))
            mean, std = process.kernel.gaussian(
                x, v, *np.float32(SIGMAS[step : step + 2]), noise_level=0.7, sigma_max=SIGMAS[1]
            )
            return np.asarray(mean), float(std)

        def over(value):
            return getattr(value, reduction)(axis=(1, 2, 3))

        mean, std = gaussian(theta)
        x_next = mean + std * noise
        old = over(norm.logpdf(x_next, mean, std)) + np.array([0.1, -0.2])

        def loss(t):
            mean, _ = gaussian(t)
            mean_ref, _ = gaussian(theta_ref)
            log_ratio = over(norm.logpdf(x_next, mean, std)) - old
            # KL = E_p[log p - log q], and log q is quadratic: its mean under p is exact at +-std.
            kl = over(
                norm.logpdf(mean + std, mean, std)
                - (norm.logpdf(mean + std, mean_ref, std) + norm.logpdf(mean - std, mean_ref, std))
                / 2
            )
            kl = kl * (-dt if weighting == "no_dt" else 1)
            return np.sum(-advantage * np.exp(log_ratio) + 0.3 * kl)

        keys, between = jax.random.split(KEY, 2), jnp.stack([x, x_next])
        rollout = Rollout(x_next, PLACES[:2], keys, step, between, old[None])

        def total(trained):
            velocities = {
                name: partial(linear, p)
                for name, p in {"policy": trained, "reference": params(theta_ref)}.items()
            }
            loss, figures = algorithm.loss(
                Setup(process, 2), velocities, rollout, 0, Credit(advantage)
            )
            return loss.sum(), figures

        (value, figures), gradient = jax.value_and_grad(total, has_aux=True)(params(theta))
        ours = np.concatenate([np.ravel(gradient["w"]), gradient["b"]])
        np.testing.assert_allclose(value, loss(theta), rtol=1e-5)
        np.testing.assert_allclose(ours, approx_fprime(theta, loss), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(figures["ratio_gap"].max(), np.exp(0.2) - 1, rtol=1e-5)


# -------------------------------------------------------------------------------- on policy and off


def test_ratio_gap_and_clip_fraction_off_policy(rolled):
    """Log-probs shifted by hand: image 2 by log 1.5 in one of three steps, image 5 by log 1.1."""
    shift = jnp.zeros((3, IMAGES)).at[1, 2].set(-jnp.log(1.5)).at[0, 5].set(-jnp.log(1.1))
    shifted = rolled.replace(log_prob=rolled.log_prob + shift)
    _, figures = linear_share(weights(0), shifted)
    np.testing.assert_allclose(figures["ratio_gap"], 0.5, rtol=1e-4)
    np.testing.assert_allclose(figures["clip_fraction"], 1 / (3 * IMAGES), rtol=1e-6)
    squares = np.log(1.5) ** 2 + np.log(1.1) ** 2
    np.testing.assert_allclose(figures["approx_kl"], squares / 2 / (3 * IMAGES), rtol=1e-4)
    by_step = {name: v for name, v in update.scalars(figures).items() if "/" in name}
    begin = int(rolled.start)
    expected = {begin: np.log(1.1) / IMAGES, begin + 1: np.log(1.5) / IMAGES, begin + 2: 0}
    assert by_step == pytest.approx(
        {f"log_prob_change/{step:02}": v for step, v in expected.items()}, rel=1e-4, abs=1e-6
    )


def test_a_constant_reward_changes_nothing(rolled):
    valid = jnp.ones(IMAGES, bool)
    advantage = advantages.normalised(jnp.full(IMAGES, -7.7), valid, group_size=IMAGES)
    algorithm, params = grpo(0.2), weights(2)
    carry = update.empty(algorithm, Setup(CPS, IMAGES), params)
    args = (params, weights(1), rolled, advantage, jnp.arange(3), carry)
    gradient, figures = share(CPS, algorithm, *args)
    assert figures["ratio_gap"] > 0.01  # off policy, and yet
    assert figures["policy_loss"] == 0
    close(gradient, jax.tree.map(jnp.zeros_like, gradient), atol=0)


def test_kl_alone_pulls_towards_the_reference(rolled):
    nothing = jnp.zeros(IMAGES)
    at, here = linear_share(weights(1), rolled, nothing)
    assert here["kl"] == 0 and optax.tree.norm(at) == 0
    away, there = linear_share(weights(0), rolled, nothing)
    assert there["kl"] > 0
    closer = jax.tree.map(lambda p, g: p - 0.1 * g, weights(0), away)
    assert 0 < linear_share(closer, rolled, nothing)[1]["kl"] < there["kl"]


# -------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_cut_into_micro_batches_does_not_matter(rolled, size):
    whole = linear_share(weights(2), rolled)
    carry = None
    for i in range(0, IMAGES, size):
        part = slice(i, i + size)
        piece = rolled.replace(x=rolled.x[:, part], log_prob=rolled.log_prob[:, part])
        piece = piece.replace(
            latents=rolled.latents[part], prompt=rolled.prompt[part], keys=rolled.keys[part]
        )
        carry = linear_share(weights(2), piece, ADVANTAGE[part], carry=carry)
    close(carry, whole, rtol=1e-5, atol=1e-6)


def test_training_some_of_the_steps(rolled):
    """Steps 0 and 2 together are the mean of each alone, and step 1 is never looked at."""
    blind = rolled.replace(log_prob=rolled.log_prob.at[1].add(-5.0))
    both = linear_share(weights(2), blind, terms=(0, 2))[0]
    first, last = (linear_share(weights(2), rolled, terms=(i,))[0] for i in (0, 2))
    close(both, jax.tree.map(lambda a, b: (a + b) / 2, first, last), rtol=1e-4, atol=1e-6)
    assert not np.allclose(first["w"], last["w"], rtol=0.1)


def test_a_window_is_replayed_at_its_own_sigmas():
    """A window that starts late, replayed from `start`, is on policy too."""

    @jax.jit
    def gap(start):
        keys = sampler.image_keys(KEY, 0, PLACES, PLACES)
        velocity, x = partial(linear, weights(0)), sampler.normal(keys, ODE_KEY, SHAPE)
        rollout = sampler.rollout(velocity, CPS, x, keys, 1, PLACES).replace(start=start)
        return linear_share(weights(0), rollout)[1]["ratio_gap"]

    assert gap(1) < 1e-6 and gap(0) > 0.1


def one_update(place):
    """A rollout and an update of images that lie where `place` puts them; and the latents."""
    tx = update.optimiser(0.1, eps=1.0)

    @jax.jit
    def run(state, places, advantage):
        keys = sampler.image_keys(state.key, 0, places, places)
        velocity, x = partial(linear, state.policy), sampler.normal(keys, ODE_KEY, SHAPE)
        rollout = sampler.rollout(velocity, CPS, x, keys, 0, places)
        gradient, figures = linear_share(state.policy, rollout, advantage)
        state, applied = update.apply_gradient(state, gradient, tx, 0.9)
        return figures | applied | {"policy": state.policy, **state.copies}, rollout.latents

    return run(start(weights(0), tx, KL), place(PLACES), place(ADVANTAGE))


def print_update_of_eight_devices():
    mesh = sharding.make_mesh()
    result, latents = one_update(partial(sharding.split_rows, mesh))
    assert [shard.data.shape[0] for shard in latents.addressable_shards] == [1] * 8
    print(json.dumps(jax.tree.map(np.ndarray.tolist, jax.device_get(result))))


def test_eight_devices_make_the_same_update_as_one():
    here = Path(__file__).parent
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    code = "import test_update; test_update.print_update_of_eight_devices()"
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    close(one_update(jnp.asarray)[0], json.loads(child.stdout), rtol=1e-5, atol=1e-6)
