"""A rollout that keeps its forward passes: the same images, the same gradient, fewer passes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import ADVANTAGE, IMAGES, KEY, SHAPE, SIGMAS, weights
from short_runs import load, rows, timeless

from flowgrpo_jax import algorithms, train, update
from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.costs import cost, run_costs
from flowgrpo_jax.sampling import sampler, sde, solvers, tails, taped
from flowgrpo_jax.sampling.sampler import ODE_KEY, Process
from flowgrpo_jax.types import Credit

KERNEL = {"kernel": sde.CPS, "noise_level": 0.6, "solver": solvers.DPMPP_2M}
PROCESSES = {
    "plain": Process(SIGMAS, window=3, **KERNEL),
    "compressed": Process(
        SIGMAS, window=3, by_start=tails.compressed(SIGMAS, 3.0, 3, 0.6), **KERNEL
    ),
}
OPTIONS = {
    "clip": {},
    "kl": {"kl_beta": 0.5},
    "guard": {"trust_region": "guard", "step_weight": "guard"},
    "dppo": {"trust_region": "dppo", "centering": True},
    "one step": {"steps": 1},
}


def curved(params, x, sigma, rows=None):
    """A velocity that is linear in neither its latents nor its weights."""
    return jnp.tanh(x @ params["w"] + sigma) @ params["w"].T + params["b"]


def drawn(process, start, velocity=curved):
    """The images of one policy, without a tape and with it."""
    places = jnp.arange(IMAGES)
    keys = sampler.image_keys(KEY, 0, jnp.zeros_like(places), places)
    x, policy = sampler.normal(keys, ODE_KEY, SHAPE), weights(0)
    plain = jax.jit(partial(sampler.rollout, partial(velocity, policy), process))
    kept = jax.jit(partial(taped.rollout, velocity, policy, process))
    return [draw(x, keys, start, places) for draw in (plain, kept)]


def gradient(options, process, rollout, velocity=curved):
    algorithm, setup = algorithms.load("grpo", options), Setup(process, 4)
    policy, others = weights(0), {name: weights(1) for name in algorithm.reads}
    terms = algorithm.terms(setup, jax.random.key(3))

    @jax.jit
    def accumulated(policy, rollout):
        carry = update.empty(algorithm, setup, policy)
        given = (rollout, Credit(ADVANTAGE), terms, IMAGES, carry)
        return update.accumulate(algorithm, setup, velocity, policy, others, *given)

    return accumulated(policy, rollout)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("start", [0, 2, 4])
def test_it_draws_the_same_images(name, start):
    """With a solver that remembers a step, before the window and after it."""
    plain, kept = drawn(PROCESSES[name], start)
    for field in ("latents", "prompt", "start", "x", "log_prob"):
        one, other = getattr(plain, field), getattr(kept, field)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=field)
    assert plain.tape is None and kept.tape.velocity.shape == (3, IMAGES, *SHAPE)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradient_is_the_same(options):
    process = PROCESSES["plain"]
    plain, kept = drawn(process, 2)
    (wanted, figures), (found, others) = (gradient(options, process, r) for r in (plain, kept))
    assert all(np.abs(x).max() > 1e-3 for x in wanted.values())
    for ours, theirs in ((found, wanted), (others, figures)):
        for name, x in ours.items():
            np.testing.assert_allclose(x, theirs[name], rtol=2e-4, atol=2e-6, err_msg=name)


def test_the_update_makes_no_forward_pass():
    """A velocity of one product: its gradient in the weights is one more. What is left of the two
    is the gradient alone."""

    def product(params, x, sigma, rows=None):
        return x @ params["w"]

    def products(rollout):
        counted = jax.make_jaxpr(partial(gradient, {}, process, velocity=product))(rollout)
        return cost.flops(counted) / (2 * IMAGES * np.prod(SHAPE) * SHAPE[-1])

    process = PROCESSES["plain"]
    plain, kept = drawn(process, 2, product)
    assert [products(plain), products(kept)] == [6, 3]


def test_a_broken_image_costs_its_tape():
    """The update of the others is computed as if there had been no tape."""
    plain, kept = drawn(PROCESSES["plain"], 2)
    assert taped.usable(kept) is kept and taped.usable(plain) is plain
    for broken in (
        replace(kept, latents=kept.latents.at[1].set(jnp.nan)),
        replace(kept, x=kept.x.at[:, 1].set(jnp.inf)),
    ):
        assert taped.usable(broken).tape is None
    found, _ = gradient({}, PROCESSES["plain"], taped.usable(broken))
    assert all(np.isfinite(x).all() for x in found.values())


def settings(runs, **changes):
    return load(runs, epochs=3, eval__every=0, train__updates_per_epoch=1, **changes)


def test_a_run_with_it_is_the_same_run(runs, tmp_path):
    """Also with guidance, whose two branches are both on the tape."""
    states = {
        tape: train.train(
            settings(runs, train__tape=tape, sample__guidance_scale=3.0), tmp_path / str(tape)
        )
        for tape in (False, True)
    }
    for path, x in states[True].policy.items():
        np.testing.assert_allclose(x, states[False].policy[path], rtol=1e-3, atol=1e-4)
    assert any(np.abs(x).max() > 1e-3 for x in states[True].policy.values())
    kept, plain = ([timeless(row) for row in rows(tmp_path / name)] for name in ("True", "False"))
    for ours, theirs in zip(kept, plain, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["reward"] == pytest.approx(theirs["reward"], rel=1e-3)
        assert ours["ratio_gap"] < 1e-6


def test_its_passes_are_counted(runs):
    """Of 4 steps 2 are trained: their forward passes are those of their gradients."""
    counted = [
        run_costs.passes(build_run(settings(runs, train__tape=tape)), 0) for tape in (False, True)
    ]
    assert counted == [(4, 2), (2, 2)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train__updates_per_epoch": 2}, "train.updates_per_epoch=2: after the first optimiser"),
        ({"train__step_each_term": True}, "train.step_each_term=True: after the first optimiser"),
        ({"sample__branches": 2}, "sample.branches=2: the forward passes that images share"),
    ],
)
def test_it_is_refused_where_the_passes_are_others(runs, changes, message):
    changes = {"train__updates_per_epoch": 1, "train__tape": True, **changes}
    with pytest.raises(ValueError, match=message):
        build_run(load(runs, **changes))


def test_it_is_refused_without_transitions(runs):
    config = settings(runs, train__tape=True)
    config.algorithm.name = "nft"
    with config.algorithm.unlocked():
        config.algorithm.options = {}
    with pytest.raises(ValueError, match="it records no transitions"):
        build_run(config)
