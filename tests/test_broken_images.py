"""One image whose latents are not finite costs its own share of an update, and nothing more."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import algorithms, update
from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.sampling import sampler, sde
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.types import Credit

GROUP, IMAGES, BROKEN = 4, 8, 1
SIGMAS = tuple(map(float, sde.sigma_schedule(8)))
ADVANTAGE = jnp.array([1.0, 0.0, -1.0, 0.5, 0.2, -0.7, 1.1, -0.6])
OPTIONS = {"neighbor": {"anchors": 2, "steps": 2}, "refl": {"last": 5}}


def velocity(policy, x, sigma, rows=None):
    return policy["w"] * x + policy["b"]


def gradient(algorithm, setup, rollout, advantage):
    policy = {"w": jnp.float32(0.3), "b": jnp.float32(0.1)}
    others = {name: {"w": jnp.float32(0.2), "b": jnp.float32(0)} for name in algorithm.reads}
    terms = algorithm.terms(setup, jax.random.key(1))
    start = update.empty(algorithm, setup, policy)
    texts = len(algorithm.texts)
    judged = (
        (lambda x: jnp.stack([x.mean((1, 2, 3))] * texts),) if algorithm.reward_gradient else ()
    )
    credit = Credit(advantage)
    given = (algorithm, setup, velocity, policy, others, rollout, credit, terms, IMAGES, start)
    return jax.jit(lambda: update.accumulate(*given, *judged))()


def drawn(setup):
    """Two groups of four images, by another policy than the one that is trained."""
    ids = jnp.arange(IMAGES) // GROUP
    keys = sampler.image_keys(jax.random.key(0), 0, ids, jnp.arange(IMAGES) % GROUP)
    noise = sampler.normal(keys, 0, (4, 4, 2))
    return sampler.rollout(lambda x, sigma: 0.25 * x, setup.process, noise, keys, 0, ids)


@pytest.mark.parametrize("name", algorithms.TABLE)
def test_a_broken_image_takes_no_part(name):
    """The gradient is that of the other images, or of the other group where images are compared.
    Without a gradient that can be had so, it is not finite, and the optimiser skips the update."""
    algorithm = algorithms.load(name, OPTIONS.get(name, {}))
    window, path = 3 if algorithm.records == "window" else 0, algorithm.records == "path"
    setup = Setup(Process(SIGMAS, sde.CPS, 0.6, window=window, path=path), GROUP)
    whole = drawn(setup)
    broken = replace(
        whole,
        latents=whole.latents.at[BROKEN].set(jnp.nan),
        x=whole.x.at[:, BROKEN].set(jnp.inf),
        log_prob=whole.log_prob.at[:, BROKEN].set(jnp.nan),
    )
    found, figures = gradient(algorithm, setup, broken, ADVANTAGE)
    if algorithm.whole == "update":
        assert not np.isfinite(found["w"])
        return
    rest = np.arange(GROUP, IMAGES) if algorithm.whole else np.delete(np.arange(IMAGES), BROKEN)
    others = replace(
        whole,
        latents=whole.latents[rest],
        prompt=whole.prompt[rest],
        keys=whole.keys[rest],
        x=whole.x[:, rest],
        log_prob=whole.log_prob[:, rest],
    )
    wanted, _ = gradient(algorithm, setup, others, ADVANTAGE[rest])
    assert any(x != 0 for x in wanted.values())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(figures))
    for path, x in found.items():
        np.testing.assert_allclose(x, wanted[path], rtol=1e-5, atol=1e-7)


def test_a_log_prob_that_is_not_finite_is_no_broken_image():
    """Where the picture is sound, a fault of the kernel must not pass in silence."""
    algorithm = algorithms.load("grpo", {})
    setup = Setup(Process(SIGMAS, sde.CPS, 0.6, window=3), GROUP)
    whole = drawn(setup)
    wrong = replace(whole, log_prob=whole.log_prob.at[:, BROKEN].set(jnp.nan))
    assert not np.isfinite(gradient(algorithm, setup, wrong, ADVANTAGE)[0]["w"])
