"""A linear velocity of twelve numbers, rollouts of it, and the gradient of an algorithm on them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax import update
from flowgrpo_jax.algorithms import Setup, renoise
from flowgrpo_jax.sampling import sampler, sde
from flowgrpo_jax.sampling.sampler import ODE_KEY, Process
from flowgrpo_jax.types import Credit, Rollout

KEY = jax.random.key(0)
SIGMAS = tuple(sde.sigma_schedule(8).tolist())
IMAGES, SHAPE = 8, (2, 2, 3)
ADVANTAGE = jnp.asarray([-2.0, 1.0, 0.25, 0.75, 1.5, -0.5, -1.25, 0.25])  # two groups of four


def setup_of(algorithm, sigmas=SIGMAS, kernel=sde.CPS, noise_level=0.8, group_size=4):
    window = len(sigmas) - 2 if algorithm.records == "window" else 0
    path = algorithm.records == "path"
    return Setup(Process(sigmas, kernel, noise_level, window=window, path=path), group_size)


def linear(params, x, sigma, rows=None):
    """A velocity with a 3 x 3 matrix and a bias; sigma is one number or one an image."""
    return x @ params["w"] + jnp.reshape(sigma, (-1, 1, 1, 1)) * params["b"]


def weights(seed, scale=0.3):
    w, b = np.split(np.random.default_rng(seed).normal(scale=scale, size=(4, 3)), [3])
    return {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(b[0], jnp.float32)}


def draw(velocity, process, key=KEY, count=IMAGES, shape=SHAPE):
    places = jnp.arange(count)
    keys = sampler.image_keys(key, 0, jnp.zeros_like(places), places)
    x = sampler.normal(keys, ODE_KEY, shape)
    return sampler.rollout(velocity, process, x, keys, 0, places)


def gradient_of(
    algorithm,
    setup,
    params,
    others,
    rollout,
    advantage,
    velocity=linear,
    images=None,
    score=None,
    key=KEY,
):
    """The gradient and figures of an update on one micro-batch, with the policies of `reads`."""
    read = {name: others[name] for name in algorithm.reads}
    static = (algorithm, setup, velocity, images, score)
    return accumulated(*static, params, read, rollout, advantage, key)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def accumulated(
    algorithm, setup, velocity, images, score, params, read, rollout, advantage, key=KEY
):
    return update.accumulate(
        algorithm,
        setup,
        velocity,
        params,
        read,
        rollout,
        Credit(advantage),
        algorithm.terms(setup, key),
        images or rollout.prompt.shape[0],
        update.empty(algorithm, setup, params),
        score,
    )


def cut(rollout, size):
    """The micro-batches of a rollout."""
    for i in range(0, rollout.prompt.shape[0], size):
        part = slice(i, i + size)
        yield rollout.replace(
            latents=rollout.latents[part],
            prompt=rollout.prompt[part],
            keys=rollout.keys[part],
            x=rollout.x[:, part],
            log_prob=rollout.log_prob[:, part],
        )


def everywhere(params):
    return dict.fromkeys(("reference", "ema", "old", "anchor", "average", "drawer"), params)


def close(a, b, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), a, b)


def finished(count=4):
    """Finished images, as a rollout by the ODE leaves them."""
    rng = np.random.default_rng(3)
    latents = jnp.asarray(rng.normal(size=(count, *SHAPE)), jnp.float32)
    keys = jax.random.split(KEY, count)
    nothing = jnp.zeros((0, count))
    return Rollout(latents, jnp.arange(count), keys, jnp.int32(0), latents[None], nothing)


def flat(params):
    return np.concatenate([np.ravel(params["w"]), np.ravel(params["b"])])


def unflat(theta):
    return {"w": theta[:9].reshape(3, 3), "b": theta[9:]}


def matching(rollout, term, sigma, params):
    """(target, velocity, x) at the noise that the rows draw, as float64 arrays of numpy."""
    x, _, target = renoise.renoise(rollout, sigma, term)
    x, target = np.asarray(x, np.float64), np.asarray(target, np.float64)
    s = np.reshape(np.asarray(sigma, np.float64), (-1, 1, 1, 1))
    w, b = (np.asarray(params[k], np.float64) for k in "wb")
    return target, x @ w + s * b, x, s
