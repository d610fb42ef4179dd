"""Branches: what is shared is computed once, and is what a rollout that shares nothing has."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.sampling import branching, sampler, sde, solvers
from flowgrpo_jax.sampling.branching import Branches
from flowgrpo_jax.sampling.sampler import ODE_KEY, SDE_KEY, Process

SHAPE = (2, 2, 3)
SIGMAS = tuple(sde.sigma_schedule(8).tolist())
KEY = jax.random.key(0)
IDS = jnp.repeat(jnp.array([3, 8]), 8)  # two groups of eight
PLACES = jnp.tile(jnp.arange(8), 2)
TREE = Branches(8, (1, 2, 4), 3.0)


def velocity(ids, x, sigma):
    """Another one for each prompt, of which x has a row for every n-th image."""
    own = ids.reshape(x.shape[0], -1)[:, 0].astype(jnp.float32)
    return jnp.sin(3 * x + own[:, None, None, None]) + sigma


@partial(jax.jit, static_argnums=(0, 4))
def shared(process, start, ids, places, shards=1):
    keys_of = partial(sampler.image_keys, KEY, 0, ids)
    nodes = branching.nodes(process.branches, keys_of, places, shards)
    x = sampler.normal(nodes.keys[0], ODE_KEY, SHAPE)
    v = partial(velocity, ids)
    return sampler.rollout(v, process, x, keys_of(places), start, ids, 0, nodes)


def alone(process, start, ids, places):
    """The same, image by image and step by step, each noise named by the image that it is of."""
    branches, low = process.branches, start
    splits = branches.splits or (start,)
    rows, log_probs = [], []
    for prompt, place in zip(ids.tolist(), places.tolist()):
        size, key = branches.leaves, jax.random.fold_in(KEY, 0)

        def noise(step, size=None, prompt=prompt, place=place, key=key):
            image = jax.random.fold_in(jax.random.fold_in(key, prompt), place // size * size)
            return jax.random.normal(jax.random.fold_in(image, step), SHAPE)[None]

        x = noise(ODE_KEY, size)
        path, scores = [x], []
        for t in range(process.steps):
            v = velocity(jnp.array([prompt]), x, SIGMAS[t])
            factor = 1.0
            if t in splits:
                size, factor = size // branches.factor, branches.noise
            if low <= t < low + process.window:
                drawn = process.transition(x, v, t, noise=factor * noise(SDE_KEY + t, size))
                x = drawn.x_next
                scores.append(drawn.log_prob)
            else:
                x = x + (SIGMAS[t + 1] - SIGMAS[t]) * v
            path.append(x)
        rows.append(jnp.stack(path))
        log_probs.append(jnp.stack(scores))
    return jnp.concatenate(rows, 1), jnp.concatenate(log_probs, 1)


CASES = {  # branches, window, its first step
    "one_split": (Branches(4), 2, 3),
    "of_a_whole_group": (Branches(8), 1, 0),
    "a_tree": (TREE, 6, 0),
    "threes_are_no_halves": (Branches(4, (0, 2)), 4, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_shared_is_what_each_image_would_have_had(case):
    branches, window, start = CASES[case]
    process = Process(SIGMAS, sde.CPS, 0.8, window=window, branches=branches)
    out = shared(process, start, IDS, PLACES)
    path, log_prob = alone(process, start, IDS, PLACES)
    np.testing.assert_allclose(out.latents, path[-1], atol=2e-5)
    np.testing.assert_allclose(out.x, path[start : start + window + 1], atol=2e-5)
    np.testing.assert_allclose(out.log_prob, log_prob, atol=1e-4)
    first = out.x.reshape(window + 1, -1, branches.leaves, *SHAPE)
    np.testing.assert_array_equal(first[0], np.broadcast_to(first[0, :, :1], first.shape[1:]))


@pytest.mark.parametrize("case", ["one_split", "a_tree"])
def test_the_cut_does_not_matter(case):
    """Through nodes too, and on several devices."""
    branches, window, start = CASES[case]
    process = Process(SIGMAS, sde.CPS, 0.8, window=window, branches=branches)
    whole = shared(process, start, IDS, PLACES)
    for i in (0, 6):
        part = slice(i, i + 6)
        out = shared(process, start, IDS[part], PLACES[part], shards=3)
        np.testing.assert_allclose(out.latents, whole.latents[part], atol=2e-5)
        np.testing.assert_allclose(out.log_prob, whole.log_prob[:, part], atol=1e-4)


def test_a_scored_transition_is_that_of_the_kernel():
    """The update scores it again with the plain deviation: every ratio is 1, also at a split."""
    process = Process(SIGMAS, sde.CPS, 0.8, window=6, branches=TREE)
    out = shared(process, 0, IDS, PLACES)
    for t in range(6):
        v = velocity(IDS, out.x[t], SIGMAS[t])
        again = process.transition(out.x[t], v, t, x_next=out.x[t + 1]).log_prob
        np.testing.assert_allclose(again, out.log_prob[t], atol=1e-4)
    # Three times the noise: the mean of z^2 is 9 in place of 1 where the path splits.
    std = jnp.array([jnp.sin(0.4 * jnp.pi) * s for s in SIGMAS[1:7]])[:, None]
    squares = -2 * (out.log_prob + jnp.log(std) + 0.5 * jnp.log(2 * jnp.pi))
    means = squares.mean(1)
    assert (means[jnp.array([1, 2, 4])] > 4).all() and (means[jnp.array([0, 3, 5])] < 2).all()


def test_forwards_are_counted():
    """A counting velocity against the formula, and the paper's tree by hand."""
    for case in ("one_split", "a_tree"):
        branches, window, start = CASES[case]
        process = Process(SIGMAS, sde.CPS, 0.8, window=window, branches=branches)
        rows = []

        def counting(x, sigma, rows=rows):
            jax.debug.callback(lambda n: rows.append(int(n)), jnp.int32(x.shape[0]))
            return velocity(IDS, x, sigma)

        keys_of = partial(sampler.image_keys, KEY, 0, IDS)
        nodes = branching.nodes(branches, keys_of, PLACES, 1)
        draw = jax.jit(partial(sampler.rollout, counting, process, nodes=nodes))
        draw(jnp.zeros((16, *SHAPE)), keys_of(PLACES), start, IDS)
        jax.effects_barrier()
        assert sum(rows) / 16 == branching.forwards(branches, SIGMAS, start, 16), case
    # Splits at 0, 3, 6 and 9 of 20: states before the steps are 1, 3 x 2, 3 x 4, 3 x 8, 10 x 16.
    tree = Branches(16, (0, 3, 6, 9))
    assert branching.forwards(tree, range(20, -1, -1), 0, 16) == (1 + 6 + 12 + 24 + 160) / 16
    # Six branches at step 4 of 10: five shared forwards, and five of each image's own.
    assert branching.forwards(Branches(6), range(10, -1, -1), 4, 24) == pytest.approx(5 / 6 + 5)
    # A tail that takes every second of the four steps after the window, then zeros.
    assert branching.forwards(Branches(), (6, 5, 4, 2, 0, 0, 0), 1, 24) == 4


def test_a_multistep_solver_remembers_what_is_shared():
    process = Process(SIGMAS, sde.CPS, 0.8, window=1, solver=solvers.DPMPP_2M, branches=Branches(4))
    out = shared(process, 3, IDS, PLACES)
    keys = sampler.image_keys(KEY, 0, IDS, PLACES // 4 * 4)
    x = sampler.normal(keys, ODE_KEY, SHAPE)
    before = sampler.ode(partial(velocity, IDS), SIGMAS[:4], x, solvers.DPMPP_2M)
    np.testing.assert_allclose(out.x[0], before, atol=2e-5)


@pytest.mark.parametrize(
    "branches, problem",
    [
        (Branches(5), r"sample\.branches=5: .*must divide sample\.group_size=16; 0 means all"),
        (Branches(16, (0, 3, 6)), r"sample\.branches=16: a tree of 3 splits has 8 leaves, or 27"),
        (Branches(1, (0,)), r"sample\.branches=1: a tree of 1 splits has 2 leaves"),
        (Branches(4, (3, 0)), r"sample\.splits=\(3, 0\): .*ascending order"),
        (Branches(4, (0, 9)), r"sample\.splits=\(0, 9\): must lie in a window .*window=9 steps"),
        (Branches(4, (0, 3), 0.0), r"sample\.split_noise=0\.0: must be above 0"),
    ],
)
def test_wrong_branches_are_named(branches, problem):
    with pytest.raises(ValueError, match=problem):
        branching.check(branches, 16, 0, 9, 9)


def test_a_tree_needs_a_window_that_stays():
    with pytest.raises(ValueError, match=r"window that is fixed at the first step"):
        branching.check(Branches(4, (1, 3)), 16, 0, 10, 5)
