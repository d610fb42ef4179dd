"""How many forward passes an algorithm's loss makes, counted in the program that is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_runs import load

from flowgrpo_jax import algorithms, update
from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.costs import cost, run_costs
from flowgrpo_jax.sampling import sampler, sde
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.types import Credit

IMAGES, SHAPE = 12, (4, 4, 2)
SIGMAS = tuple(map(float, sde.sigma_schedule(10)))
CASES = {  # {algorithm: (options, passes an image and term)}
    "grpo": ({}, 1),
    "nft": ({}, 1),
    "refl": ({"last": 5}, 1),
    "draft": ({"last": 4}, 4),
    "draft_lv": ({"noised": 2}, 1),
    "flowbp": ({"active": 4}, 4),
    "neighbor": ({"anchors": 4, "steps": 4}, 4 / IMAGES),
}


def velocity(policy, x, sigma, rows=None):
    """One product of the flat latents with a matrix, so that passes are products."""
    return (x.reshape(len(x), -1) @ policy["w"]).reshape(x.shape)


@pytest.mark.parametrize("name", CASES)
def test_the_passes_of_a_loss(name):
    """A pass of the policy with its gradient takes three products in the weights' shape, of those
    that are read one. The first pass of a chain has no gradient with respect to its latents."""
    options, passes = CASES[name]
    algorithm = algorithms.load(name, options)
    window = 3 if algorithm.records == "window" else 0
    process = Process(SIGMAS, sde.CPS, 0.6, window=window, path=algorithm.records == "path")
    setup = Setup(process, IMAGES)
    assert algorithm.passes(setup) == pytest.approx(passes)
    ids = jnp.zeros(IMAGES, int)
    keys = sampler.image_keys(jax.random.key(0), 0, ids, jnp.arange(IMAGES))
    policy = {"w": 0.1 * jnp.eye(int(np.prod(SHAPE)))}
    rollout = sampler.rollout(
        lambda x, s: velocity(policy, x, s), process, sampler.normal(keys, 0, SHAPE), keys, 0, ids
    )
    terms = algorithm.terms(setup, jax.random.key(0))
    judged = (lambda x: x.mean((1, 2, 3))[None],) if algorithm.reward_gradient else ()

    def gradient(policy):
        others = dict.fromkeys(algorithm.reads, policy)
        start = update.empty(algorithm, setup, policy)
        advantage = jnp.linspace(-1, 1, IMAGES)
        return update.accumulate(
            algorithm,
            setup,
            velocity,
            policy,
            others,
            rollout,
            Credit(advantage),
            terms,
            IMAGES,
            start,
            *judged,
        )

    one = 2 * IMAGES * policy["w"].size
    found = cost.flops(jax.make_jaxpr(gradient)(policy)) / one / len(terms)
    read = len(algorithm.reads)
    # Between a gradient in the weights alone and one in all that came before, with activations
    # computed again.
    assert passes * (2 + read) <= found <= passes * (4 + read)


def test_data_cost_passes_too(runs):
    """Half as many samples of the base as images, drawn in the rollout's steps, at as many levels
    as steps are trained, in every second epoch."""
    plain = build_run(load(runs))
    images = plain.plan.images // plain.plan.updates // 2
    data = {"data__source": "base", "data__weight": 0.1, "data__images": images, "data__every": 2}
    run = build_run(load(runs, **data))
    key = sampler.epoch_key(jax.random.key(run.config.seed), 0, sampler.TERMS_KEY)
    levels = len(run.algorithm.terms(run.setup, key))
    more = [run_costs.passes(run, i).forwards - run_costs.passes(plain, i).forwards for i in (0, 1)]
    assert sorted(more) == pytest.approx([0, (run.config.sample.steps + 3 * levels) / 2])
