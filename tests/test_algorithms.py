"""Algorithms: every row of the table alike, then each against what is known of it alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import (
    IMAGES,
    KEY,
    SIGMAS,
    close,
    cut,
    draw,
    everywhere,
    finished,
    flat,
    gradient_of,
    linear,
    matching,
    setup_of,
    unflat,
    weights,
)
from scipy.optimize import approx_fprime

from flowgrpo_jax import advantages, algorithms, update
from flowgrpo_jax.algorithms import renoise
from flowgrpo_jax.algorithms.trust_regions import clipped
from flowgrpo_jax.sampling import sde

ADVANTAGE = jnp.asarray([-2.0, 1.0, 0.25, 0.75, 1.5, -0.5, -1.25, 0.25])  # two groups of four
ROWS = {  # case: row, options that suit a rollout of eight steps
    "grpo": ("grpo", {"clip_range": 0.2}),
    "grpo_guard": ("grpo", {"clip_range": 0.2, "trust_region": "guard", "step_weight": "guard"}),
    "grpo_dppo": ("grpo", {"trust_region": "dppo", "centering": True, "step_weight": "flash"}),
    "nft": ("nft", {}),
    "awm": ("awm", {"levels": 3}),
    "dgpo": ("dgpo", {}),
    "vgrpo": ("vgrpo", {}),
    "vgrpo_clipped": ("vgrpo", {"clip_range": 0.2, "kl_beta": 0.3}),
    "ram": ("ram", {}),
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
# Rows that take the gradient of the reward, and read no advantage: tests/test_reward_gradients.py
REWARD_GRADIENTS = {"refl", "draft", "draft_lv", "flowbp", "srpo"}
# Regressions: equal rewards still train the images that were drawn, and nothing is pushed away.
REGRESSIONS = {"rwr", "rwr_softmax", "orw"}
PULL_ONLY = REGRESSIONS | {"sft"}


def load(case):
    name, options = ROWS[case]
    return algorithms.load(name, options)


# --------------------------------------------------------------------------- every row


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
    "ram": ("ram", {"scale": 30.0}),
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


@pytest.mark.parametrize(
    "name, options, problem",
    [
        (
            "ppo",
            {},
            r"'ppo' is unknown: choose from awm, crd, dgpo, dpo, draft, draft_lv",
        ),
        ("nft", {"clip_range": 1}, r"clip_range is unknown; .*nft takes beta=1.0"),
        ("grpo", {"clip_range": 0.0}, r"clip_range=0.0: must be above 0"),
        ("grpo", {"kl_beta": -0.1}, r"kl_beta=-0.1: must be at least 0"),
        ("grpo", {"kl_weighting": "dt"}, r"kl_weighting='dt': choose from 'exact', 'no_dt'"),
        ("grpo", {"step_choice": "last"}, r"step_choice='last': choose from 'random', 'first'"),
        ("nft", {"beta": 0.0}, r"beta=0.0: must be above 0"),
        ("awm", {"share": 2.0}, r"share=2.0: must be at most 1"),
        ("dgpo", {"beta": 0.0}, r"beta=0.0: must be above 0"),
        ("dgpo", {"first_steps": 3}, r"first_steps=3: must be at least levels=4"),
        ("dgpo", {"clip_range": -1.0}, r"clip_range=-1.0: must be at least 0"),
        ("vgrpo", {"soft_clip": -1.0}, r"soft_clip=-1.0: must be at least 0"),
        ("vgrpo", {"levels": 0}, r"levels=0: must be at least 1"),
        ("ram", {"scale": 0.0}, r"scale=0.0: must be above 0"),
        ("crd", {"center": "batch"}, r"center='batch': choose from 'update', 'group'"),
        ("crd", {"old_most": 1.0}, r"old_most=1.0: must be in \[0, 1\)"),
        ("dpo", {"beta": -1.0}, r"beta=-1.0: must be above 0"),
        ("dpo", {"reset_every": -1}, r"reset_every=-1: must be at least 0, which means never"),
        ("sft", {"levels": 0}, r"levels=0: must be at least 1"),
        ("rwr", {"temperature": 0.0}, r"temperature=0.0: must be above 0"),
        ("rwr", {"weighting": "max"}, r"weighting='max': choose from 'exp', 'softmax'"),
        ("orw", {"alpha": -0.1}, r"alpha=-0.1: must be at least 0"),
    ],
)
def test_wrong_options_are_named(name, options, problem):
    with pytest.raises(ValueError, match=problem):
        algorithms.load(name, options)


@pytest.mark.parametrize(
    "name, options, problem",
    [
        ("grpo", {"steps": 9}, r"steps=9: the window has 7 steps to train; choose 1 to 7, or 0"),
        ("awm", {"levels": 8}, r"levels=8: sample.steps=8 and share=0.9 leave 7 noise levels"),
        ("ram", {"levels": 8}, r"levels=8: sample.steps=8 and share=0.9 leave 7 noise levels"),
        ("vgrpo", {"levels": 9}, r"levels=9: sample.steps=8 leave 8 noise levels"),
        ("orw", {"levels": 9}, r"levels=9: sample.steps=8 leave 8 noise levels"),
        ("dgpo", {"first_steps": 9}, r"first_steps=9: a rollout has 8 steps \(sample.steps\)"),
    ],
)
def test_more_terms_than_the_rollout_has_are_refused(name, options, problem):
    algorithm = algorithms.load(name, options)
    with pytest.raises(ValueError, match=problem):
        algorithm.terms(setup_of(algorithm), KEY)


def test_a_loss_with_other_figures_is_refused():
    algorithm, params = load("nft"), weights(0)
    setup = setup_of(algorithm)
    rollout = draw(partial(linear, params), setup.process)
    wrong = algorithms.Algorithm(algorithm.loss, algorithm.terms, ("loss",), reads=algorithm.reads)
    with pytest.raises(ValueError, match=r"returns the figures .*names \['loss'\]"):
        gradient_of(wrong, setup, params, everywhere(params), rollout, ADVANTAGE)


# ------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",  # slope = d loss / d log_prob, 0 where the clip holds
    [
        (2, 1.5, -2.4, 0.0),  # better and already likelier: clipped
        (2, 0.5, -1.0, -1.0),  # better but less likely: pulled back, unclipped
        (-2, 1.5, 3.0, 3.0),  # worse but likelier: pushed back, unclipped
        (-2, 0.5, 1.6, 0.0),  # worse and already less likely: clipped
        (2, 1.1, -2.2, -2.2),  # within the range
        (-2, 0.9, 1.8, 1.8),
        (2, 1.0, -2.0, -2.0),  # on policy the slope is -A
        (-2, 1.0, 2.0, 2.0),
        (0, 1.5, 0.0, 0.0),
    ],
)
def test_clipped_loss(advantage, ratio, loss, slope):
    old = jnp.float32(-0.7)

    def value(log_prob):
        return clipped(log_prob - old, jnp.float32(advantage), 0.2)

    (ours, its_ratio), gradient = jax.value_and_grad(value, has_aux=True)(old + np.log(ratio))
    np.testing.assert_allclose([ours, its_ratio, gradient], [loss, ratio, slope], atol=1e-6)


def test_on_policy_the_gradient_is_the_policy_gradient():
    log_prob, advantage = jnp.linspace(-3, 3, 7), jnp.linspace(-5, 5, 7)
    gradient = jax.grad(lambda p: clipped(p - log_prob, advantage, 1e-5)[0].sum())(log_prob)
    np.testing.assert_allclose(gradient, -advantage)


@pytest.mark.parametrize("log_ratio", [-1e4, 19.9, 45.0, 100.0, 1e4])
def test_far_off_policy_loss_and_gradient_are_finite(log_ratio):
    """Log-probs that are sums over 65,536 dimensions move by as much, and one such image must not
    take the whole update with it, least of all one without an advantage."""
    advantage, old = jnp.array([1.0, 0.0, -1.0]), jnp.zeros(3)

    def total(log_prob):
        return clipped(log_prob - old, advantage, 0.2)[0].sum()

    value, gradient = jax.value_and_grad(total)(old + log_ratio)
    assert np.isfinite(value) and gradient[1] == 0
    assert np.isfinite((1e6 * gradient) ** 2).all()  # in its norm, by a steep log-prob


@pytest.mark.parametrize("gap, warned", [(0.9e-5, False), (1.1e-5, True), (np.nan, True)])
def test_a_policy_that_learns_from_another_is_a_warning(gap, warned):
    warning = algorithms.load("grpo", {"clip_range": 1e-5}).warning({"ratio_gap": gap})
    assert ("exceeds clip_range 1e-05" in warning) == warned


# ------------------------------------------------------------------------ decoupled rows


def test_renoised_images_lie_between_the_image_and_the_noise():
    rollout, sigma = finished(), jnp.array([0.0, 0.25, 0.5, 1.0])
    x, _, target = renoise.renoise(rollout, sigma, 3)
    noise = target + rollout.latents
    s = np.reshape(sigma, (-1, 1, 1, 1))
    np.testing.assert_allclose(x, (1 - s) * rollout.latents + s * noise, atol=1e-6)
    other = renoise.renoise(rollout, sigma, 4).target + rollout.latents
    assert np.abs(np.corrcoef(np.ravel(noise), np.ravel(other))[0, 1]) < 0.5


@pytest.mark.parametrize("low, high, terms", [(1, 13, 6), (0, 20, 4), (0, 10, 3)])
def test_strata_cover_the_range_evenly(low, high, terms):
    """1..12 of 14 in six parts are AWM's; 20 in four are [0, 5), [5, 10), [10, 15), [15, 20)."""
    rollout = finished(6000)
    drawn = [np.asarray(renoise.stratum(rollout, k, terms, low, high)) for k in range(terms)]
    width = (high - low) / terms
    for k, steps in enumerate(drawn):
        assert low + int(k * width) == steps.min()
        assert steps.max() == low + int(np.ceil((k + 1) * width)) - 1
    counts = np.bincount(np.concatenate(drawn))[low:]
    np.testing.assert_allclose(counts, 6000 * terms / (high - low), rtol=0.15)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_on_policy_is_the_normalised_error_times_the_advantage(beta):
    """With old = current and |A| <= C the gradient is A d[|x_0(v) - x_0|^2 / w], whatever beta and
    C are: an identity between the methods, checked by finite differences in numpy."""
    advantage = np.array([1.0, -2.0, 0.5, -0.3])
    algorithm, rollout, params = algorithms.load("nft", {"beta": beta}), finished(), weights(0)
    setup = setup_of(algorithm)
    terms = range(setup.process.steps - 1)

    def error(theta, sizes=None):
        total, new = 0.0, []
        for k in terms:
            sigma = jnp.full(4, SIGMAS[k])
            target, v, _, s = matching(rollout, k, sigma, unflat(theta))
            miss = s * (target - v)  # of the image that the velocity predicts
            new.append(np.abs(miss).mean((1, 2, 3)))
            size = sizes[k] if sizes else new[-1]
            total += np.sum(advantage * np.square(miss).mean((1, 2, 3)) / size)
        return total / (4 * len(terms)), new

    theta = flat(params).astype(np.float64)
    sizes = error(theta)[1]
    wanted = approx_fprime(theta, lambda t: error(t, sizes)[0], 1e-6)
    found, _ = gradient_of(
        algorithm, setup, params, everywhere(params), rollout, jnp.asarray(advantage, jnp.float32)
    )
    np.testing.assert_allclose(flat(found), wanted, rtol=2e-3, atol=2e-4)


def test_nft_learns_from_the_positive_policy_alone_where_the_advantage_is_full():
    """At A = C the weight of the negative policy is 0: v+ = v with beta = 1, so that the loss is
    C |x_0(v) - x_0|^2 / w, wherever the old policy is."""
    algorithm, rollout = algorithms.load("nft", {"anchor": 0.0}), finished()
    setup, params = setup_of(algorithm), weights(0)
    velocities = {"policy": partial(linear, params), "old": partial(linear, weights(1, 9.0))}
    loss, _ = algorithm.loss(setup, velocities, rollout, jnp.int32(2), jnp.full(4, 5.0))
    target, v, _, s = matching(rollout, 2, jnp.full(4, SIGMAS[2]), params)
    miss = s * (target - v)
    wanted = 5 * np.square(miss).mean((1, 2, 3)) / np.abs(miss).mean((1, 2, 3))
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)


def test_awm_is_the_weighted_error_by_finite_differences():
    options = {"levels": 3, "kl_beta": 0.25, "anchor_beta": 0.5}
    algorithm, rollout, params = algorithms.load("awm", options), finished(), weights(0)
    setup, reference, anchor = setup_of(algorithm), weights(1), weights(2)
    advantage = np.array([1.0, -2.0, 0.5, -0.3])

    def loss(theta):
        total = 0.0
        for k in range(3):
            step = renoise.stratum(rollout, k, 3, 1, 8)  # 90 % of eight steps, less the first
            sigma = jnp.asarray(SIGMAS)[step]
            target, v, x, s = matching(rollout, k, sigma, unflat(theta))
            error = np.square(v - target).mean((1, 2, 3))
            score = -s.ravel() * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25
            total -= np.sum(advantage / 5 * score)
            for other, beta in ((reference, 0.25), (anchor, 0.5)):
                w, b = (np.asarray(other[name], np.float64) for name in "wb")
                total += beta * np.sum(np.square(v - (x @ w + s * b)).mean((1, 2, 3)))
        return total / 12

    theta = flat(params).astype(np.float64)
    others = {"reference": reference, "anchor": anchor}
    found, figures = gradient_of(
        algorithm, setup, params, others, rollout, jnp.asarray(advantage, jnp.float32)
    )
    np.testing.assert_allclose(flat(found), approx_fprime(theta, loss, 1e-6), rtol=2e-3, atol=1e-4)
    assert figures["ratio_gap"] == 0


def test_awm_with_a_clip_compares_with_the_policy_that_drew():
    algorithm = algorithms.load("awm", {"levels": 3, "clip_range": 0.1, "anchor_beta": 0.0})
    assert set(algorithm.reads) == {"old", "reference"} and set(algorithm.copies) == {"old"}
    setup, rollout, params = setup_of(algorithm), finished(), weights(0)
    on = gradient_of(algorithm, setup, params, everywhere(params), rollout, ADVANTAGE[:4])[1]
    off = gradient_of(algorithm, setup, params, everywhere(weights(1)), rollout, ADVANTAGE[:4])[1]
    assert on["ratio_gap"] < 1e-6 and off["ratio_gap"] > 0.01
