"""Algorithms: every row of the table alike, on a rollout and up to a known optimum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import (
    ADVANTAGE,
    IMAGES,
    KEY,
    SIGMAS,
    close,
    cut,
    draw,
    everywhere,
    gradient_of,
    linear,
    setup_of,
    weights,
)

from flowgrpo_jax import advantages, algorithms, update
from flowgrpo_jax.sampling import sde

ROWS = {  # case: row, options that suit a rollout of eight steps
    "grpo": ("grpo", {"clip_range": 0.2}),
    "grpo_guard": ("grpo", {"clip_range": 0.2, "trust_region": "guard", "step_weight": "guard"}),
    "grpo_dppo": ("grpo", {"trust_region": "dppo", "centering": True, "step_weight": "flash"}),
    "nft": ("nft", {}),
    "awm": ("awm", {"levels": 3}),
    "dgpo": ("dgpo", {}),
    "vgrpo": ("vgrpo", {}),
    "vgrpo_clipped": ("vgrpo", {"clip_range": 0.2, "kl_beta": 0.3}),
    "ram": ("ram", {"levels": 3}),
    "crd": ("crd", {"levels": 8}),
    "crd_by_group": ("crd", {"levels": 8, "center": "group"}),
    "crd_softmax": ("crd", {"levels": 8, "center_weights": "softmax"}),
    "crd_hard": ("crd", {"levels": 8, "center_weights": "hard"}),
    "dpo": ("dpo", {"beta": 1.0}),
    "sft": ("sft", {"kl_beta": 0.1}),
    "rwr": ("rwr", {}),
    "rwr_softmax": ("rwr", {"weighting": "softmax"}),
    "orw": ("orw", {}),
    "neighbor": ("neighbor", {"anchors": 3}),
    "neighbor_clipped": ("neighbor", {"anchors": 3, "clip_range": 0.2}),
}
# Rows that take the gradient of the reward, and read no advantage: test_reward_gradients.py,
# test_flowbp.py and test_srpo.py have them.
REWARD_GRADIENTS = {"refl", "draft", "draft_lv", "flowbp", "srpo"}
# Regressions: equal rewards still train the images that were drawn, and nothing is pushed away.
REGRESSIONS = {"rwr", "rwr_softmax", "orw"}
PULL_ONLY = REGRESSIONS | {"sft"}


def load(case):
    name, options = ROWS[case]
    return algorithms.load(name, options)


# ---------------------------------------------------------------------------------------- every row


def test_every_row_has_options_here():
    assert {name for name, _ in ROWS.values()} | REWARD_GRADIENTS == set(algorithms.TABLE)


@pytest.mark.parametrize("name", sorted(set(ROWS) - REGRESSIONS))
def test_without_advantages_nothing_is_learned(name):
    """On policy, with the reference and all copies where the policy is."""
    algorithm, params = load(name), weights(0)
    setup = setup_of(algorithm)
    rollout = draw(partial(linear, params), setup.process)
    nothing = jnp.zeros(IMAGES)
    gradient, _ = gradient_of(algorithm, setup, params, everywhere(params), rollout, nothing)
    close(gradient, jax.tree.map(jnp.zeros_like, gradient), atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ROWS) - PULL_ONLY))
def test_opposite_advantages_have_opposite_gradients(name):
    algorithm, params = load(name), weights(0)
    setup = setup_of(algorithm)
    rollout = draw(partial(linear, params), setup.process)
    others = everywhere(params)
    up, down = (
        gradient_of(algorithm, setup, params, others, rollout, sign * ADVANTAGE)[0]
        for sign in (1, -1)
    )
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(up))
    close(up, jax.tree.map(jnp.negative, down), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_the_cut_into_micro_batches_does_not_matter(name):
    """Off policy. What is drawn for an image depends on its key, or on its group's, alone."""
    algorithm = load(name)
    size = {"": 2, "group": 4, "update": IMAGES}[algorithm.whole]
    setup, params, others = setup_of(algorithm), weights(2), everywhere(weights(1))
    rollout = draw(partial(linear, weights(0)), setup.process)
    whole, figures = gradient_of(algorithm, setup, params, others, rollout, ADVANTAGE)
    parts = []
    for i, piece in enumerate(cut(rollout, size)):
        args = (params, others, piece, ADVANTAGE[i * size : (i + 1) * size])
        parts.append(gradient_of(algorithm, setup, *args, images=IMAGES))
    total = jax.tree.map(lambda *gs: sum(gs), *[gradient for gradient, _ in parts])
    close(total, whole, rtol=1e-4, atol=1e-5)
    for figure, value in figures.items():
        values = [found[figure] for _, found in parts]
        joined = max(values) if figure in algorithm.worst else sum(values)
        np.testing.assert_allclose(joined, value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_far_off_policy_the_gradient_is_finite(name):
    algorithm = load(name)
    setup, others = setup_of(algorithm), everywhere(weights(1, scale=30.0))
    rollout = draw(partial(linear, weights(0)), setup.process)
    gradient, _ = gradient_of(algorithm, setup, weights(2, 30.0), others, rollout, ADVANTAGE)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ROWS)
def test_an_advantage_may_differ_by_term(name):
    """The same advantage for every term is the plain advantage."""
    algorithm, params = load(name), weights(0)
    setup = setup_of(algorithm)
    rollout = draw(partial(linear, params), setup.process)
    others = everywhere(weights(1))
    by_term = jnp.broadcast_to(ADVANTAGE, (len(SIGMAS), IMAGES))
    plain, each = (
        gradient_of(algorithm, setup, params, others, rollout, a)[0] for a in (ADVANTAGE, by_term)
    )
    close(each, plain, rtol=1e-6)


OPTIMISED = {  # where the row's own options hold the policy back, or need more than five steps
    "grpo_flow_sde": ("grpo", {"clip_range": 0.2}),
    "dgpo": ("dgpo", {"levels": 2, "first_steps": 4, "beta": 0.1, "kl_beta": 0.0}),
    "ram": ("ram", {"scale": 30.0, "levels": 3}),
    "crd": ("crd", {"levels": 5, "kl_beta": 0.0}),
    "crd_by_group": ("crd", {"levels": 5, "kl_beta": 0.0, "center": "group"}),
    "dpo": ("dpo", {"beta": 0.1}),
    "sft": ("sft", {}),
    "vgrpo_clipped": ("vgrpo", {"clip_range": 0.2, "kl_beta": 0.01}),
    "orw": ("orw", {"temperature": 0.5, "alpha": 0.01}),
}


@pytest.mark.parametrize("case", sorted(ROWS | OPTIMISED))
def test_it_finds_a_known_optimum(case):
    """The policy is one vector, the reward -|end - target|^2: the mean end must become target."""
    target = jnp.array([1.0, -0.6])
    name, options = (ROWS | OPTIMISED)[case]
    algorithm = algorithms.load(name, options)
    sigmas = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    kernel = sde.FLOW_SDE if case == "grpo_flow_sde" else sde.CPS
    setup = setup_of(algorithm, sigmas, kernel, noise_level=0.5, group_size=16)
    tx = update.optimiser(0.03)

    def velocity(params, x, sigma, rows=None):
        return jnp.broadcast_to(params["v"], x.shape)

    def epoch(state, number):
        key = jax.random.fold_in(state.key, number)
        policies = {"policy": state.policy, "reference": {"v": jnp.zeros(2)}, **state.copies}
        drawn_by = partial(velocity, policies[algorithm.draws])
        rollout = draw(drawn_by, setup.process, key, 64, (1, 1, 2))
        reward = -jnp.square(rollout.latents - target).sum((1, 2, 3))
        advantage = advantages.normalised(reward, jnp.ones(64, bool), group_size=16)
        gradient, _ = gradient_of(
            algorithm, setup, state.policy, policies, rollout, advantage, velocity
        )
        begun = state.step
        state, _ = update.apply_gradient(state, gradient, tx, 0.9)
        return update.end_epoch(state, begun, algorithm), rollout.latents.mean((0, 1, 2))

    state = update.init({"v": jnp.zeros(2)}, algorithm.copies, {}, tx, KEY)
    _, ends = jax.jit(lambda s: jax.lax.scan(epoch, s, jnp.arange(150)))(state)
    assert np.abs(ends[:10].mean(0) - target).min() > 0.4
    np.testing.assert_allclose(ends[-50:].mean(0), target, atol=0.1)


def test_copies_move_at_the_end_of_an_epoch():
    """DiffusionNFT's copy after its n-th optimiser step keeps n / 1000 of itself, at most half."""
    algorithm, tx = load("nft"), update.optimiser(0.1)
    state = update.init({"v": jnp.zeros(1)}, algorithm.copies, {}, tx, KEY)
    state = state.replace(policy={"v": jnp.ones(1)})
    for step, kept in ((1, 0.001), (100, 0.1), (500, 0.5), (2000, 0.5)):
        after = state.replace(step=jnp.int32(step))
        moved = update.end_epoch(after, jnp.int32(step - 1), algorithm)
        np.testing.assert_allclose(moved.copies["old"]["v"], 1 - kept, rtol=1e-6)
        np.testing.assert_array_equal(moved.copies["ema"]["v"], 0)


def test_a_loss_with_other_figures_is_refused():
    algorithm, params = load("nft"), weights(0)
    setup = setup_of(algorithm)
    rollout = draw(partial(linear, params), setup.process)
    wrong = algorithms.Algorithm(algorithm.loss, algorithm.terms, ("loss",), reads=algorithm.reads)
    with pytest.raises(ValueError, match=r"returns the figures .*names \['loss'\]"):
        gradient_of(wrong, setup, params, everywhere(params), rollout, ADVANTAGE)
