"""The advantages of a tree, by hand and against statistics of the standard library."""

import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import KEY, SHAPE, SIGMAS, close, flat, gradient_of, linear, weights

from flowgrpo_jax import advantages, algorithms
from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.sampling import branching, sampler, sde
from flowgrpo_jax.sampling.branching import ALONE, Branches
from flowgrpo_jax.sampling.sampler import ODE_KEY, Process

FOUR = Branches(4, (0, 2))  # two splits of a window of four steps
REWARDS = [1.0, 3.0, 4.0, 8.0, 5.0, 5.0, 5.0, 5.0]  # two trees of four leaves
EDGES = 2 + 2 + 4 + 4


def make(branches=FOUR, steps=4, group_size=8, clip=9.0, **options):
    return advantages.load(
        "tree", options, group_size=group_size, clip=clip, branches=branches, steps=steps
    )


def compute(rewards, row=None, memory=None, log_prob=None):
    """Advantages [W, B] and the memory."""
    row = row or make()
    scores = jnp.asarray([rewards], jnp.float32)
    memory = row.initial(3) if memory is None else memory
    paths = [] if log_prob is None else [jnp.asarray(log_prob, jnp.float32)]
    out, memory = row.compute(memory, scores, jnp.ones_like(scores), jnp.arange(1), *paths)
    return np.asarray(out), memory


def counted_once(nodes):
    """The edges of each step as they stand in the leaves, [W, 4], from the nodes' advantages."""
    mean_weight = EDGES / (4 * 4)
    return [np.repeat(row, 4 // len(row)) / (4 // len(row)) / mean_weight for row in nodes]


def z(values):
    return [(v - statistics.mean(values)) / statistics.stdev(values) for v in values]


def test_a_tree_by_hand():
    """Nodes at the ends of the four steps: (2, 6), (2, 6), and the leaves twice. (2, 6) has the
    sample deviation sqrt(8); a tree whose leaves are all alike teaches nothing."""
    pair = [-1 / np.sqrt(2), 1 / np.sqrt(2)]
    leaves = z([1.0, 3.0, 4.0, 8.0])
    out, _ = compute(REWARDS)
    np.testing.assert_allclose(
        out[:, :4], counted_once([pair, pair, leaves, leaves]), rtol=1e-5, atol=1e-6
    )
    assert not out[:, 4:].any()


def test_softmax_of_the_edges_by_hand():
    """Log-probs at the second split that make the better leaf three times as likely."""
    log_prob = np.zeros((4, 8))
    log_prob[2, [1, 3]] = np.log(3)
    pair = z([0.25 * 1 + 0.75 * 3, 0.25 * 4 + 0.75 * 8])
    out, _ = compute(REWARDS, make(fusion="softmax"), log_prob=log_prob)
    wanted = counted_once([pair, pair, z([1.0, 3.0, 4.0, 8.0]), z([1.0, 3.0, 4.0, 8.0])])
    np.testing.assert_allclose(out[:, :4], wanted, rtol=1e-5, atol=1e-6)
    even, _ = compute(REWARDS, make(fusion="softmax", alpha=0.0), log_prob=log_prob)
    np.testing.assert_allclose(even, compute(REWARDS)[0], atol=1e-6)


def test_a_leaf_without_a_score_is_as_if_it_had_never_been():
    """Its parent is worth what its sibling scored, and of four leaves three are compared."""
    out, _ = compute([np.nan, 3.0, 4.0, 8.0, *REWARDS[4:]])
    leaves = [0.0, *z([3.0, 4.0, 8.0])]
    pair = z([3.0, 6.0])
    np.testing.assert_allclose(
        out[:, :4], counted_once([pair, pair, leaves, leaves]), rtol=1e-5, atol=1e-6
    )
    assert not compute([np.nan] * 8)[0].any()


def test_without_splits_it_is_the_group():
    """But for the sample deviation and the smaller epsilon; also where a group shares its noise."""
    plain = advantages.load("group", {}, group_size=8, clip=9.0)
    scores = jnp.asarray([REWARDS])
    wanted, _ = plain.compute({}, scores, jnp.ones_like(scores), jnp.arange(1))
    for branches in (ALONE, Branches(4)):
        out, _ = compute(REWARDS, make(branches))
        np.testing.assert_allclose(out, np.tile(wanted * np.sqrt(7 / 8), (4, 1)), rtol=1e-3)


@pytest.mark.parametrize("reward", [0.1, -7.7, 23.4])
def test_a_constant_reward_gives_exactly_nothing(reward):
    assert not compute([reward] * 8)[0].any()


def test_pruned_leaves_keep_the_path_before_the_last_split():
    whole, _ = compute(REWARDS)
    some, _ = compute(REWARDS, make(keep_leaves=2))
    np.testing.assert_array_equal(some[:3], whole[:3])  # with the split's own edges
    np.testing.assert_array_equal(some[3, [0, 3]], whole[3, [0, 3]])
    assert not some[3, [1, 2]].any()


def test_pruned_steps_move_towards_the_root():
    """Of 8 steps two are left out, in two epochs each; the last split is at step 4, and upstream
    stops with the depth 4, which is the child of step 3."""
    row = make(Branches(4, (0, 4)), steps=8, prune=2, prune_every=2)
    memory, left_out = None, []
    for _ in range(10):
        out, memory = compute(REWARDS, row, memory)
        left_out.append(tuple(np.flatnonzero(~out[:, :4].any(1)).tolist()))
    assert left_out == [(6, 7)] * 2 + [(5, 6)] * 2 + [(4, 5)] * 2 + [(3, 4)] * 4
    assert int(memory["epochs"]) == 10


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"fusion": "max"}, r"fusion='max': choose from mean, softmax"),
        ({"alpha": -1.0}, r"alpha=-1.0: must be at least 0"),
        ({"prune": 4}, r"prune=4: must be between 0 and 3"),
        ({"prune_every": 0}, r"prune_every=0: must be at least 1"),
        ({"keep_leaves": 5}, r"keep_leaves=5: must be between 0 and 4"),
        ({"keep_leaves": 1}, r"keep_leaves=1: keep the best and the worst"),
    ],
)
def test_a_wrong_option_is_named(options, problem):
    with pytest.raises(ValueError, match=problem):
        make(**options)


# ---------------------------------------------------------------------------- the gradient

GRPO = algorithms.load("grpo", {"clip_range": 0.2})


@partial(jax.jit, static_argnums=0)
def draw(process, params):
    places = jnp.arange(8)
    keys_of = partial(sampler.image_keys, KEY, 0, jnp.zeros_like(places))
    nodes = branching.nodes(process.branches, keys_of, places, 1)
    x = sampler.normal(nodes.keys[0], ODE_KEY, SHAPE)
    v = partial(linear, params)
    return sampler.rollout(v, process, x, keys_of(places), 0, places, 0, nodes)


def test_every_edge_counts_once():
    """The gradient of the leaves' view against a sum over the tree's edges, each scored by itself
    from its parent's state; and on policy every ratio is 1."""
    params = weights(0)
    process = Process(SIGMAS, sde.CPS, 0.8, window=4, branches=Branches(4, (0, 2), 4.0))
    setup, rollout = Setup(process, 8), draw(process, params)
    rewards = [0.3, 1.0, -2.0, 0.1, 1.5, 0.2, 0.9, -0.4]
    out, _ = compute(rewards)
    rows = []

    def counting(params, x, sigma):
        rows.append(x.shape[0])
        return linear(params, x, sigma)

    gradient, figures = gradient_of(GRPO, setup, params, {}, rollout, jnp.asarray(out), counting)
    assert set(rows) == {2, 4, 8}  # a state that images share is looked at once
    assert figures["ratio_gap"] < 1e-5

    nodes = {2: np.reshape(rewards, (4, 2)).mean(1), 1: np.array(rewards)}

    def objective(params):
        total = 0.0
        for tree in range(2):
            for step, below in enumerate((2, 2, 1, 1)):
                values = nodes[below].reshape(2, -1)[tree]
                for node, advantage in enumerate(z(values.tolist())):
                    leaf = 4 * tree + node * below  # any below the node: they share the edge
                    x, x_next = (rollout.x[step + i, leaf][None] for i in (0, 1))
                    v = linear(params, x, jnp.asarray(SIGMAS[step]))
                    score = process.transition(x, v, step, x_next=x_next).log_prob
                    total -= advantage * score[0] / (2 * EDGES)
        return total

    close(gradient, jax.jit(jax.grad(objective))(params), rtol=1e-3, atol=1e-5)
    assert np.abs(flat(gradient)).max() > 1e-3
    nothing = jnp.asarray(compute([0.7] * 8)[0])
    still, _ = gradient_of(GRPO, setup, params, {}, rollout, nothing)
    assert not np.any(flat(still))


def test_noise_that_is_drawn_anew_is_refused():
    process = Process(SIGMAS, sde.CPS, 0.8, window=4, branches=FOUR)
    for options in ({"trust_region": "guard"}, {"trust_region": "dppo"}, {"centering": True}):
        algorithm = algorithms.load("grpo", options)
        with pytest.raises(ValueError, match=r"sample\.splits=\(0, 2\): .*trust_region to 'clip'"):
            algorithm.terms(Setup(process, 8), KEY)


@pytest.mark.parametrize(
    "options", [{"trust_region": "guard"}, {"trust_region": "dppo"}, {"centering": True}]
)
def test_noise_that_was_scaled_at_a_split_is_refused(options):
    """Also where the images part at the window's first step: the noise is their own, but scaled."""
    algorithm = algorithms.load("grpo", options)
    process = Process(SIGMAS, sde.CPS, 0.8, window=4, branches=Branches(4, (), 2.0))
    with pytest.raises(ValueError, match=r"split_noise=2\.0: .*set sample\.split_noise to 1"):
        algorithm.terms(Setup(process, 8), KEY)
    for branches in (Branches(4), Branches(1, (), 2.0)):  # without branches nothing splits
        plain = Process(SIGMAS, sde.CPS, 0.8, window=4, branches=branches)
        assert algorithm.terms(Setup(plain, 8), KEY).shape == (4,)
