"""GRPO's step weights, trust regions, score centering, and KL: known numbers and identities."""

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
    draw,
    gradient_of,
    linear,
    setup_of,
    weights,
)
from scipy.stats import norm

from flowgrpo_jax import algorithms, update
from flowgrpo_jax.algorithms import step_weights, trust_regions
from flowgrpo_jax.algorithms.trust_regions import Move
from flowgrpo_jax.sampling import sde
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.types import Credit

ADVANTAGE = jnp.linspace(-2, 1, IMAGES)
FLASH = sde.Kernel(  # the diffusion sigma_max sigma; the mean plays no part in a weight
    lambda x, v, sigma, after, *, noise_level, sigma_max: sde.Gaussian(
        x, sigma_max * sigma * jnp.sqrt(sigma - after)
    )
)


def weighed(name, process, start=0):
    weigh = partial(step_weights.TABLE[name], process, jnp.int32(start))
    steps = start + np.arange(process.window)
    return np.array([weigh(jnp.int32(step)) for step in steps])


# ---------------------------------------------------------------------------- step weights


def test_flash_has_its_published_table():
    """Flash-GRPO's ten numbers, for 20 steps of the schedule with shift 3 that its code has."""
    published = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    u = 1 - np.linspace(1, 1 / 1000, 21)
    sigmas = (*np.flip(3 * u / (1 + 2 * u))[:-1].tolist(), 0.0)
    found = weighed("flash", Process(sigmas, FLASH, 1.0, window=10))
    np.testing.assert_allclose(found * np.mean(published), published, atol=1e-4)


def test_flash_is_normalised_over_the_window():
    process = Process(SIGMAS, sde.FLOW_SDE, 0.7, window=3)
    found = weighed("flash", process, start=2)
    np.testing.assert_allclose(found.mean(), 1, rtol=1e-6)
    assert (np.diff(found) < 0).all()


def test_tempflow_and_guard_by_hand():
    """s = 0.7 sqrt(0.8 / 0.2) = 1.4 at sigma = 0.8, and h = 0.3."""
    process = Process((0.9, 0.8, 0.5, 0.0), sde.FLOW_SDE, 0.7, window=1)
    np.testing.assert_allclose(weighed("tempflow", process, 1), 2.25 * 1.4 * 0.3**0.5, rtol=1e-6)
    np.testing.assert_allclose(weighed("guard", process, 1), 1 / 0.3, rtol=1e-6)
    np.testing.assert_allclose(weighed("none", process, 1), 1)


@pytest.mark.parametrize("name", step_weights.TABLE)
def test_a_weight_multiplies_the_loss(name):
    params = weights(0)
    plain, other = (
        algorithms.load("grpo", {"step_weight": step, "kl_beta": 0.0, "clip_range": 0.2})
        for step in ("none", name)
    )
    setup = setup_of(plain)
    rollout = draw(partial(linear, weights(1)), setup.process)
    term = jnp.int32(2)
    args = (setup, {"policy": partial(linear, params)}, rollout, term, Credit(ADVANTAGE))
    factor = step_weights.TABLE[name](setup.process, rollout.start, term)
    np.testing.assert_allclose(other.loss(*args)[0], factor * plain.loss(*args)[0], rtol=1e-6)


# --------------------------------------------------------------------------- trust regions


def measured(process, rollout, term, params, centering=False):
    sigma = jnp.asarray(SIGMAS)[term]
    x, x_next = rollout.x[term], rollout.x[term + 1]
    new = process.transition(x, linear(params, x, sigma), term, x_next=x_next)
    return trust_regions.measure(process, rollout, term, new, centering)


@pytest.mark.parametrize("kernel", ["flow_sde", "cps"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_move_from_the_rollout_is_that_of_the_two_means(kernel, reduction):
    """The rollout's mean is had from its noise; here it is computed from its policy, and the
    log-ratio from scipy's normal densities."""
    process = Process(SIGMAS, sde.load(kernel), 0.7, window=7, reduction=reduction)
    old, new, term = weights(0), weights(1), jnp.int32(3)
    rollout = draw(partial(linear, old), process)
    x_next = np.asarray(rollout.x[4], np.float64)
    gaussians = [
        process.transition(rollout.x[3], linear(p, rollout.x[3], SIGMAS[3]), term, x_next=x_next)
        for p in (old, new)
    ]
    (mean_old, std), mean = (
        (np.asarray(gaussians[0].mean, np.float64), float(gaussians[0].std)),
        (np.asarray(gaussians[1].mean, np.float64)),
    )
    reduce = np.mean if reduction == "mean" else np.sum
    z, d = (x_next - mean_old) / std, mean - mean_old
    scores = norm.logpdf(x_next, mean, std) - norm.logpdf(x_next, mean_old, std)
    move = measured(process, rollout, term, new)
    tolerance = {"rtol": 2e-4, "atol": 1e-4}
    np.testing.assert_allclose(move.shift, reduce(z * d, axis=(1, 2, 3)), **tolerance)
    np.testing.assert_allclose(move.kl, reduce(d**2, axis=(1, 2, 3)) / (2 * std**2), **tolerance)
    np.testing.assert_allclose(move.log_ratio, reduce(scores, axis=(1, 2, 3)), **tolerance)
    # GRPO-Guard's own form: the log-ratio without its expectation, times the standard deviation.
    np.testing.assert_allclose(move.shift, (move.log_ratio + move.kl) * std, **tolerance)


def test_guard_clips_the_exponential_of_the_shift():
    move = Move(jnp.full(3, -9.0), jnp.log(jnp.array([1.5, 0.5, 1.1])), jnp.zeros(3))
    found = trust_regions.guard(move, jnp.array([2.0, 2.0, -1.0]), 0.2)
    np.testing.assert_allclose(found.loss, [-2.4, -1.0, 1.1], rtol=1e-6)
    assert found.outside.tolist() == [True, True, False]


def test_dppo_drops_what_verl_omni_drops():
    """Its test: ratios 1.2, 0.8, 1.2, 0.8, advantages 10, -10, -8, 8 and a KL of
    0.2^2 / (2 x 0.25^2) = 0.32 give the mask true, true, false, false."""
    ratio, advantage = jnp.array([1.2, 0.8, 1.2, 0.8]), jnp.array([10.0, -10.0, -8.0, 8.0])
    move = Move(jnp.log(ratio), jnp.zeros(4), jnp.full(4, 0.2**2 / (2 * (0.5 * 0.5) ** 2)))
    found = trust_regions.dppo(move, advantage, 1e-5)
    assert found.outside.tolist() == [True, True, False, False]
    np.testing.assert_allclose(found.loss, [0, 0, 9.6, -6.4], rtol=1e-6)
    kept = trust_regions.dppo(move, advantage, 0.33)
    assert not kept.outside.any()
    np.testing.assert_allclose(kept.loss, -advantage * ratio, rtol=1e-6)


@pytest.mark.parametrize("name", trust_regions.TABLE)
def test_on_policy_nothing_has_moved(name):
    algorithm = algorithms.load("grpo", {"trust_region": name, "clip_range": 1e-5})
    setup, params = setup_of(algorithm, kernel=sde.FLOW_SDE, noise_level=0.7), weights(0)
    rollout = draw(partial(linear, params), setup.process)
    _, figures = gradient_of(algorithm, setup, params, {}, rollout, ADVANTAGE)
    assert figures["ratio_gap"] < 1e-5 and figures["clip_fraction"] == 0
    assert algorithm.warning({"ratio_gap": float(figures["ratio_gap"])}) == ""


# ------------------------------------------------------------------------------- centering


def log_ratio_gradient(process, rollout, params, centering, output=lambda move: move.log_ratio):
    """The gradient of each image's log-ratio (or shift) in the policy's numbers."""
    return jax.jacobian(lambda p: output(measured(process, rollout, jnp.int32(3), p, centering)))(
        params
    )


@pytest.mark.parametrize("density", sde.DENSITIES)
def test_centering_changes_nothing_where_the_policy_drew(density):
    process = Process(SIGMAS, sde.CPS, 0.8, window=7, density=density)
    rollout = draw(partial(linear, weights(0)), process)
    plain, centred = (log_ratio_gradient(process, rollout, weights(0), c) for c in (False, True))
    close(centred, plain, rtol=1e-3, atol=1e-3)


def test_centering_leaves_the_value():
    process = Process(SIGMAS, sde.CPS, 0.8, window=7)
    rollout = draw(partial(linear, weights(0)), process)
    plain, centred = (measured(process, rollout, 3, weights(1), c) for c in (False, True))
    np.testing.assert_array_equal(plain.log_ratio, centred.log_ratio)


def test_a_centred_score_has_the_mean_zero():
    """Over many draws of the rollout's noise, as that of a policy elsewhere has not."""
    process = Process(SIGMAS, sde.CPS, 0.8, window=7)
    old, new = weights(0, 0.5), weights(1, 0.5)
    rollout = draw(partial(linear, old), process, count=2_000, shape=(1, 1, 3))
    gradients = [log_ratio_gradient(process, rollout, new, c)["b"] for c in (False, True)]
    plain, centred = (np.asarray(g, np.float64) for g in gradients)
    error = centred.std(0) / np.sqrt(len(centred))
    assert (np.abs(centred.mean(0)) < 4 * error).all()
    assert (np.abs(plain.mean(0)) > 6 * error).any()


def test_guards_ratio_is_centred_already():
    """Its gradient is std times that of the centred log-ratio, also off policy."""
    process = Process(SIGMAS, sde.FLOW_SDE, 0.7, window=7)
    rollout = draw(partial(linear, weights(0)), process)
    x = rollout.x[3]
    std = process.transition(x, x, jnp.int32(3), x_next=x).std
    shift = log_ratio_gradient(process, rollout, weights(1), False, lambda move: move.shift)
    centred = log_ratio_gradient(process, rollout, weights(1), True)
    close(shift, jax.tree.map(lambda g: std * g, centred), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------- reference


def test_kl_of_velocities_is_their_squared_distance():
    """Velocities that differ by 3 everywhere have the distance 9 (verl-omni's number)."""
    algorithm = algorithms.load(
        "grpo", {"kl_beta": 0.5, "kl_weighting": "velocity", "clip_range": 0.2}
    )
    setup, params = setup_of(algorithm), weights(0)
    rollout = draw(partial(linear, params), setup.process)
    velocities = {
        "policy": partial(linear, params),
        "reference": lambda x, sigma: linear(params, x, sigma) + 3,
    }
    loss, figures = algorithm.loss(
        setup, velocities, rollout, jnp.int32(1), Credit(jnp.zeros(IMAGES))
    )
    np.testing.assert_allclose(figures["kl"], 9, rtol=1e-5)
    np.testing.assert_allclose(loss, 4.5, rtol=1e-5)


def test_the_reference_is_reset_where_a_multiple_was_passed():
    """With two updates an epoch and one that was skipped, no multiple is hit exactly."""
    algorithm = algorithms.load("grpo", {"kl_beta": 0.1, "reset_every": 10})
    assert algorithm.reads == ("reference",)
    state = update.init({"v": jnp.zeros(1)}, algorithm.copies, {}, update.optimiser(0.1), KEY)
    resets = []
    for begun, step in ((0, 2), (7, 9), (9, 11), (11, 13), (10, 10), (18, 20), (20, 22)):
        now = state.replace(step=jnp.int32(step), policy={"v": jnp.full(1, float(step))})
        moved = update.end_epoch(now, jnp.int32(begun), algorithm)
        resets.append(float(moved.copies["reference"]["v"][0]))
    assert resets == [0, 0, 11, 0, 0, 20, 0]


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"step_weight": "snr"}, "step_weight='snr': choose from 'none', 'tempflow', 'flash', 'gu"),
        ({"trust_region": "kl"}, "trust_region='kl': choose from 'clip', 'guard', 'dppo'"),
        ({"kl_threshold": 0.0}, "kl_threshold=0.0: must be above 0"),
        ({"reset_every": -1}, "reset_every=-1: must be at least 0, which means never"),
        ({"reset_every": 5}, "reset_every=5: with kl_beta=0 nothing reads the reference; set kl_b"),
        (
            {"centering": True, "trust_region": "guard"},
            "centering=True: trust_region='guard' has a centred ratio already; set centering to F",
        ),
    ],
)
def test_wrong_options_are_named(options, problem):
    with pytest.raises(ValueError, match=problem):
        algorithms.load("grpo", options)
