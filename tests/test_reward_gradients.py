"""Algorithms that differentiate the reward: every row alike, then ReFL, DRaFT and DRaFT-LV."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goal_reward import GOAL, NOTHING, ROWS, gradient, load, near, path
from linear_policy import (
    IMAGES,
    KEY,
    SHAPE,
    SIGMAS,
    close,
    cut,
    draw,
    gradient_of,
    linear,
    setup_of,
    weights,
)

from flowgrpo_jax import algorithms, update
from flowgrpo_jax.algorithms import Setup
from flowgrpo_jax.algorithms.reward_gradients import shortfall
from flowgrpo_jax.sampling import sampler, solvers
from flowgrpo_jax.sampling.sampler import Process

# ------------------------------------------------------------------------------------ every row


@pytest.mark.parametrize("case", ROWS)
def test_a_constant_reward_teaches_nothing(case):
    found, _ = gradient(case, weights(0), path(weights(0)), score=constant)
    close(found, jax.tree.map(jnp.zeros_like, found))


def constant(x):
    return jnp.ones((2, x.shape[0]))


@pytest.mark.parametrize("case", ROWS)
def test_the_cut_into_micro_batches_does_not_matter(case):
    params, rollout = weights(2), path(weights(0))
    whole, figures = gradient(case, params, rollout)
    parts = [gradient(case, params, piece, images=IMAGES) for piece in cut(rollout, 2)]
    total = jax.tree.map(lambda *gs: sum(gs), *[found for found, _ in parts])
    close(total, whole, rtol=1e-4, atol=1e-5)
    for name, value in figures.items():
        np.testing.assert_allclose(sum(f[name] for _, f in parts), value, rtol=1e-4)


@pytest.mark.parametrize("case", ROWS)
def test_it_finds_a_known_optimum(case):
    """The policy is one vector, the reward -|end - target|^2: the mean end must become target."""
    target = jnp.array([1.0, -0.6])
    algorithm, tx = load(case), update.optimiser(0.03)
    setup = setup_of(algorithm, (1.0, 0.8, 0.6, 0.4, 0.2, 0.0))

    def velocity(params, x, sigma):
        return jnp.broadcast_to(params["v"], x.shape)

    def score(x):
        return jnp.stack([-jnp.square(x - target).sum((1, 2, 3)), jnp.zeros(x.shape[0])])

    def epoch(state, number):
        key = jax.random.fold_in(state.key, number)
        rollout = draw(partial(velocity, state.policy), setup.process, key, 64, (1, 1, 2))
        more = {"velocity": velocity, "score": score, "key": key}
        found, _ = gradient_of(algorithm, setup, state.policy, {}, rollout, jnp.zeros(64), **more)
        state, _ = update.apply_gradient(state, found, tx, 0.9)
        return state, rollout.latents.mean((0, 1, 2))

    state = update.init({"v": jnp.zeros(2)}, algorithm.copies, {}, tx, KEY)
    _, ends = jax.jit(lambda s: jax.lax.scan(epoch, s, jnp.arange(150)))(state)
    assert np.abs(ends[:10].mean(0) - target).min() > 0.4
    np.testing.assert_allclose(ends[-50:].mean(0), target, atol=0.1)


@pytest.mark.parametrize("case", ["refl", "flowbp"])
def test_above_the_threshold_nothing_is_learned(case):
    name, options = ROWS[case]
    low, high = (algorithms.load(name, options | {"threshold": t}) for t in (-1e3, 1e3))
    found, figures = gradient(low, weights(0), path(weights(0)))
    close(found, jax.tree.map(jnp.zeros_like, found))
    assert figures["below_threshold"] == figures["policy_loss"] == 0
    far, _ = gradient(high, weights(0), path(weights(0)))
    close(far, gradient(case, weights(0), path(weights(0)))[0], rtol=1e-5)


def test_shortfall():
    value, figures = shortfall(jnp.array([0.2, 0.9]), 0.55)
    np.testing.assert_allclose(value, [0.35, 0], rtol=1e-6)
    np.testing.assert_array_equal(figures["below_threshold"], [1, 0])
    np.testing.assert_allclose(shortfall(jnp.array([0.2, 0.9]), jnp.inf)[0], [-0.2, -0.9])


@pytest.mark.parametrize(
    "name, options, problem",
    [
        ("refl", {"last": 0}, r"last=0: must be at least 1"),
        ("draft", {"last": -1}, r"last=-1: must be at least 0, which means all steps"),
        ("draft", {"threshold": float("nan")}, r"threshold=nan: must be a number, or inf"),
        ("draft_lv", {"noised": -1}, r"noised=-1: must be at least 0"),
        ("flowbp", {"active": 0}, r"active=0: must be at least 1"),
        ("flowbp", {"late_bias": -1.0}, r"late_bias=-1.0: must be at least 0"),
        ("flowbp", {"rescale": 2.0}, r"rescale=2.0: must be in \[0, 1\]"),
        ("srpo", {"levels": 0}, r"levels=0: must be at least 1"),
        ("srpo", {"good": ""}, r"good='': must be a word or more"),
        ("srpo", {"bad": "Detail", "good": "Detail"}, r"good='Detail': must differ from bad"),
        ("neighbor", {"anchors": 0}, r"anchors=0: must be at least 1"),
        ("neighbor", {"clip_range": -0.1}, r"clip_range=-0.1: must be at least 0"),
    ],
)
def test_wrong_options_are_named(name, options, problem):
    with pytest.raises(ValueError, match=problem):
        algorithms.load(name, options)


@pytest.mark.parametrize(
    "name, options, problem",
    [
        ("refl", {}, r"last=11: a rollout has 8 steps \(sample.steps\); choose at most as many"),
        ("draft", {"last": 9}, r"last=9: a rollout has 8 steps"),
        ("draft_lv", {"last": 9}, r"last=9: a rollout has 8 steps"),
        ("flowbp", {"active": 9}, r"active=9: a rollout has 8 steps"),
        ("srpo", {"levels": 7}, r"levels=7: sample.steps=8 leave 6 levels"),
        ("neighbor", {"anchors": 5}, r"anchors=5: must be at most sample.group_size=4"),
        ("neighbor", {"steps": 9}, r"steps=9: must be at most sample.steps=8"),
    ],
)
def test_more_than_the_rollout_has_is_refused(name, options, problem):
    algorithm = algorithms.load(name, options)
    with pytest.raises(ValueError, match=problem):
        algorithm.terms(setup_of(algorithm), KEY)


@pytest.mark.parametrize("case", ["draft", "flowbp"])
def test_steps_of_another_solver_are_refused(case):
    setup = Setup(Process(SIGMAS, solver=solvers.DPMPP_2M), 4)
    with pytest.raises(ValueError, match=r"sample\.solver: .* has to take them by 'euler'"):
        load(case).terms(setup, KEY)


# ------------------------------------------------------------------------------------- the path


@pytest.mark.parametrize("solver", [solvers.EULER, solvers.DPMPP_2M])
def test_a_rollout_keeps_its_path(solver):
    """Its first latents are the noise and its last the images, and each step is the solver's."""
    v = partial(linear, weights(0))
    kept, plain = (draw(v, Process(SIGMAS, solver=solver, path=path)) for path in (True, False))
    assert kept.x.shape == (len(SIGMAS), IMAGES, *SHAPE) and kept.log_prob.shape == (0, IMAGES)
    np.testing.assert_array_equal(kept.latents, plain.latents)
    np.testing.assert_array_equal(kept.x[-1], plain.latents)
    np.testing.assert_array_equal(kept.x[0], sampler.normal(kept.keys, sampler.ODE_KEY, SHAPE))
    for t, x in ((0, kept.x[0]), (7, kept.x[7])):  # Euler's with both
        step = x + (SIGMAS[t + 1] - SIGMAS[t]) * v(x, SIGMAS[t])
        np.testing.assert_allclose(kept.x[t + 1], step, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- ReFL and DRaFT


def test_through_all_steps_it_is_the_gradient_of_the_ode():
    params, rollout = weights(0), path(weights(0))

    def loss(params):
        return -near(sampler.ode(partial(linear, params), SIGMAS, rollout.x[0]))[0].mean()

    found, figures = gradient("draft_all", params, rollout)
    close(found, jax.grad(loss)(params), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(figures["policy_loss"], loss(params), rtol=1e-5)


def test_two_steps_by_hand():
    """v = w x takes x to x (1 + h w) (1 + h' w), whose derivative by w is known."""
    process = Process((1.0, 0.7, 0.4, 0.0), path=True)
    algorithm = algorithms.load("draft", {"last": 2})

    def velocity(w, x, sigma):
        return w["w"] * x

    rollout = draw(partial(velocity, {"w": 0.5}), process, count=1, shape=(1, 1, 1))
    start = 1 - 0.3 * 0.5
    np.testing.assert_allclose(rollout.x[1], start * rollout.x[0], rtol=1e-6)
    args = (algorithm, Setup(process, 1), {"w": jnp.float32(0.5)}, {}, rollout, jnp.zeros(1))
    found, _ = gradient_of(*args, velocity=velocity, score=lambda x: x.sum((1, 2, 3))[None])
    h, k = -0.3, -0.4
    wanted = -(h * (1 + 0.5 * k) + k * (1 + 0.5 * h)) * start * rollout.x[0].item()
    np.testing.assert_allclose(found["w"], wanted, rtol=1e-5)


def test_at_the_last_step_they_are_all_the_same():
    """ReFL at the last step, DRaFT-1, DRaFT-LV without copies."""
    params, rollout = weights(2), path(weights(0))
    rows = [("refl", {"last": 1}), ("draft", {"last": 1}), ("draft_lv", {"noised": 0, "last": 1})]
    found = [gradient(algorithms.load(*row), params, rollout)[0] for row in rows]
    assert np.abs(found[0]["b"]).max() > 1e-4  # the last step is short
    for other in found[1:]:
        close(found[0], other, rtol=1e-4)


def test_refl_is_the_gradient_at_the_drawn_step():
    """A bias b of the velocity moves the image that is predicted at level s by -s^2 b."""
    algorithm, params, rollout = load("refl"), weights(0), path(weights(0))
    (step,) = algorithm.terms(setup_of(algorithm), KEY)
    sigma, x = SIGMAS[step], np.asarray(rollout.x[step])
    image = x - sigma * np.asarray(linear(params, x, sigma))
    slope = -2 * (image - GOAL)  # of the reward
    wanted = sigma**2 * slope.sum((1, 2)).mean(0)
    np.testing.assert_allclose(gradient(algorithm, params, rollout)[0]["b"], wanted, rtol=1e-4)


def test_refl_draws_each_of_the_last_steps_alike():
    algorithm = load("refl")
    keys = jax.random.split(KEY, 2000)
    drawn = jax.vmap(lambda key: algorithm.terms(setup_of(algorithm), key))(keys)
    counts = np.bincount(np.ravel(drawn), minlength=8)
    assert counts[:3].sum() == 0
    np.testing.assert_allclose(counts[3:], 400, rtol=0.2)


def test_copies_of_an_exact_policy_are_the_image():
    """Where the velocity leads from any latents to the image, all copies have its reward."""
    rollout, algorithm = path(weights(0)), load("draft_lv")
    setup, sigma = setup_of(algorithm), SIGMAS[6]

    def exact(x, level):
        np.testing.assert_allclose(level, sigma)
        return (x - rollout.latents) / sigma

    seen = []
    for term in algorithm.terms(setup, KEY):

        def score(x):
            seen.append(x)
            return near(x)

        algorithm.loss(setup, {"policy": exact}, rollout, term, NOTHING, score)
    assert len(seen) == 3
    for image in seen:
        np.testing.assert_allclose(image, rollout.latents, atol=1e-5)
