"""Losses without log-probs: the identities between them, and each against numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import SIGMAS, close, everywhere, finished, flat, matching, setup_of, unflat
from matching_losses import ADVANTAGE, OLD, POLICY, REFERENCE, STEP, errors, gradient, loss_of
from scipy.optimize import approx_fprime
from scipy.special import expit, logit, softmax
from scipy.stats import norm

from flowgrpo_jax import algorithms
from flowgrpo_jax.algorithms import crd, renoise

# ------------------------------------------------------------------------------ identities


def test_nft_is_vgrpo_is_crd_where_the_old_policy_is_the_current_one():
    """V-GRPO's error is of the image and CRD's of the velocity, sigma times smaller."""
    nft = gradient("nft", {"anchor": 0.0})
    vgrpo = gradient("vgrpo", {"levels": 8, "soft_clip": 0.0})
    crd = gradient("crd", {"levels": 8, "kl_beta": 0.0})
    assert np.abs(flat(nft)).max() > 0.01
    close(nft, vgrpo, rtol=1e-4, atol=1e-6)
    close(nft, jax.tree.map(lambda g: SIGMAS[STEP] * g, crd), rtol=1e-4, atol=1e-6)


def test_dgpo_is_half_the_weighted_error_where_the_reference_is_the_policy():
    options = {"clip_range": 0.0, "kl_beta": 0.0}
    found = gradient("dgpo", options, group_size=4)
    shared = renoise.share_keys(finished(), 4)
    wanted = approx_fprime(
        flat(POLICY).astype(np.float64),
        lambda t: 0.5 * np.sum(np.asarray(ADVANTAGE) * errors(shared, unflat(t), SIGMAS[STEP])[0]),
        1e-6,
    )
    np.testing.assert_allclose(flat(found), wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_ram_is_awm_without_its_power_and_weight(scale):
    """AWM with the power 1 has the weight sigma, which the advantages take away; its KL weight is
    1 / scale. Away from the reference."""
    options = {"power": 1.0, "advantage_scale": 1.0, "anchor_beta": 0.0, "levels": 6}
    sigma = SIGMAS[STEP + 1]  # six levels begin with the second step, one each
    others = everywhere(REFERENCE)
    awm = gradient("awm", options | {"kl_beta": 1 / scale}, others, advantage=ADVANTAGE / sigma)
    ram = gradient("ram", {"levels": 6, "scale": scale}, others)
    close(ram, jax.tree.map(lambda g: scale * g, awm), rtol=1e-3, atol=1e-4)


def test_vgrpo_on_policy_has_the_published_value():
    """An advantage of 1.7 and a bound of 3 give the loss -3 tanh(1.7 / 3)."""
    algorithm = algorithms.load("vgrpo", {"soft_clip": 3.0})
    loss, _ = loss_of(algorithm, finished(), POLICY, {}, jnp.full(4, 1.7), term=1)
    np.testing.assert_allclose(loss, -3 * np.tanh(1.7 / 3), rtol=1e-6)
    opposite, _ = loss_of(algorithm, finished(), POLICY, {}, jnp.full(4, -1.7), term=1)
    np.testing.assert_allclose(opposite, -loss, rtol=1e-6)


# ---------------------------------------------------------------------------- noise, levels


def test_a_group_shares_its_first_images_noise_and_level():
    rollout = finished(6)
    shared = renoise.share_keys(rollout, 3)
    noise = renoise.renoise(shared, jnp.full(6, 0.5), 2).target + rollout.latents
    own = renoise.renoise(rollout, jnp.full(6, 0.5), 2).target + rollout.latents
    for i in range(6):
        np.testing.assert_allclose(noise[i], own[i // 3 * 3], atol=1e-6)
    u = np.asarray(renoise.uniform(shared, 2))
    assert len(set(u[:3].tolist())) == len(set(u[3:].tolist())) == 1 and u[0] != u[3]


def test_logit_normal_levels_have_their_density():
    """The share of step k is that of sigmoid(z) in [k / T, (k + 1) / T)."""
    rollout, steps = finished(20_000), len(SIGMAS) - 1
    setup = setup_of(algorithms.load("rwr", {}))
    sigma = renoise.renoise_logit_normal(setup, rollout, jnp.int32(0)).sigma
    found = [float((sigma == jnp.float32(s)).mean()) for s in SIGMAS[:-1]]
    edges = norm.cdf(logit(np.arange(steps + 1) / steps))
    np.testing.assert_allclose(found, np.diff(edges), atol=0.012)


# --------------------------------------------------------------------------- rows, by hand


def test_dgpo_weighs_a_group_by_how_far_it_is_told_apart():
    """Away from the reference, in numpy; two groups of two, of which one is clipped by the average
    in part."""
    options = {"beta": 3.0, "clip_range": 0.05, "kl_beta": 0.5}
    algorithm, rollout = algorithms.load("dgpo", options), finished()
    others = {"reference": REFERENCE, "average": OLD}
    loss, figures = loss_of(algorithm, rollout, POLICY, others, group_size=2)
    shared, a = renoise.share_keys(rollout, 2), np.asarray(ADVANTAGE)
    d, ref, average = (errors(shared, p, SIGMAS[STEP])[0] for p in (POLICY, REFERENCE, OLD))
    weight = np.repeat(expit(3 * (a * (d - ref)).reshape(2, 2).sum(1) / 2), 2)
    np.testing.assert_allclose(figures["group_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(figures["policy_loss"], weight * a * d, rtol=1e-4)
    np.testing.assert_allclose(loss, weight * a * d + 0.5 * figures["kl"], rtol=1e-4)
    ratio = np.exp(average - d)
    outside = np.where(a > 0, ratio > 1.05, ratio < 0.95)
    assert 0 < outside.sum() < 4
    np.testing.assert_array_equal(figures["clip_fraction"], outside)


def test_dgpo_learns_nothing_from_an_image_outside_of_the_clip():
    options = {"beta": 3.0, "clip_range": 0.05, "kl_beta": 0.0}
    others = {"reference": REFERENCE, "average": OLD}
    given = {"others": others, "group_size": 2}
    _, figures = loss_of(algorithms.load("dgpo", options), finished(), POLICY, others, group_size=2)
    kept = np.asarray(1 - figures["clip_fraction"]) * np.asarray(figures["group_weight"])
    shared, a = renoise.share_keys(finished(), 2), np.asarray(ADVANTAGE)
    wanted = approx_fprime(
        flat(POLICY).astype(np.float64),
        lambda t: np.sum(kept * a * errors(shared, unflat(t), SIGMAS[STEP])[0]),
        1e-6,
    )
    np.testing.assert_allclose(
        flat(gradient("dgpo", options, **given)), wanted, rtol=5e-3, atol=1e-3
    )


def test_dgpo_trains_the_same_early_levels_for_everybody():
    algorithm = algorithms.load("dgpo", {"levels": 3, "first_steps": 5})
    drawn = [
        tuple(algorithm.terms(setup_of(algorithm), jax.random.key(k)).tolist()) for k in range(40)
    ]
    assert all(len(set(d)) == 3 and set(d) <= set(range(5)) for d in drawn)
    assert len(set(drawn)) == 10  # every choice of 3 of 5


def test_crd_by_hand():
    """Away from all copies, centred over the update and over groups of two."""
    rollout, a = finished(), np.asarray(ADVANTAGE)
    reward = a / 10 + 0.5
    new, old = (
        (error / size) for error, size in (errors(rollout, p, SIGMAS[STEP]) for p in (POLICY, OLD))
    )
    implicit = old - new
    for center, size in (("update", 4), ("group", 2)):
        options = {"beta": 2.0, "center": center, "levels": 8}
        algorithm = algorithms.load("crd", options)
        others = {"old": OLD, "reference": REFERENCE}
        loss, figures = loss_of(algorithm, rollout, POLICY, others, group_size=2)

        def centred(x, size=size):
            return x - np.repeat(x.reshape(-1, size).mean(1), size)

        policy = 5 / 2 * np.square(2 * centred(implicit) - centred(reward))
        np.testing.assert_allclose(figures["policy_loss"], policy, rtol=1e-3, atol=1e-5)
        least = 1e-4 / 0.1
        kl = 0.1 * (least + reward * (1 - least)) * np.asarray(figures["kl"])
        np.testing.assert_allclose(loss, policy + kl, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weights, temperature", [("softmax", 0.5), ("hard", 1.0)])
def test_crd_centred_in_both_directions_by_hand(weights, temperature):
    rollout, a = finished(), np.asarray(ADVANTAGE)
    reward = a / 10 + 0.5
    new, old = (
        (error / size) for error, size in (errors(rollout, p, SIGMAS[STEP]) for p in (POLICY, OLD))
    )
    implicit = old - new
    if weights == "softmax":
        towards = [softmax(reward / temperature), softmax(-reward / temperature)]
    else:
        towards = [softmax(np.where(sign * a > 0, sign * reward, -np.inf)) for sign in (1, -1)]
    policy = np.mean(
        [np.square(implicit - p @ implicit - (reward - p @ reward)) for p in towards], axis=0
    )
    options = {"center_weights": weights, "temperature": temperature, "levels": 8}
    others = {"old": OLD, "reference": REFERENCE}
    _, figures = loss_of(algorithms.load("crd", options), rollout, POLICY, others, group_size=2)
    np.testing.assert_allclose(figures["policy_loss"], 5 * policy, rtol=1e-3, atol=1e-5)


def test_crd_softmax_at_a_high_temperature_is_uniform():
    rollout, others = finished(), {"old": OLD, "reference": REFERENCE}
    losses = [
        loss_of(algorithms.load("crd", options), rollout, POLICY, others)[0]
        for options in ({}, {"center_weights": "softmax", "temperature": 1e6})
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_crd_hard_weighs_all_alike_where_a_pool_is_empty():
    reward = jnp.array([[0.5, 0.7, 0.9]])
    good, bad = crd.WEIGHTS["hard"](reward, jnp.array([[0.0, 2.0, 4.0]]), 1.0)
    np.testing.assert_allclose(good, [[0, *softmax([0.7, 0.9])]], rtol=1e-6)
    np.testing.assert_allclose(bad, np.full((1, 3), 1 / 3), rtol=1e-6)


def test_the_copies_of_crd_and_dgpo_keep_what_is_published():
    crd, dgpo = (algorithms.load(name, {}) for name in ("crd", "dgpo"))
    assert (crd.draws, dgpo.draws) == ("drawer", "drawer")

    def kept(algorithm, name):
        return [float(algorithm.copies[name](0, jnp.int32(n))) for n in (0, 75, 100, 1000)]

    np.testing.assert_allclose(kept(crd, "old"), [0.25, 0.625, 0.75, 0.999], rtol=1e-6)
    np.testing.assert_allclose(kept(crd, "drawer"), [0, 0, 0.1875, 0.999], rtol=1e-6)
    np.testing.assert_allclose(kept(dgpo, "average"), [0, 0.075, 0.1, 0.3], rtol=1e-6)
    np.testing.assert_allclose(kept(dgpo, "drawer"), [0, 0, 0, 0.3], rtol=1e-6)


def test_vgrpo_off_policy_by_hand():
    """The ratio to the policy that drew, its clip, and the distance of the predicted images."""
    options = {"levels": 8, "soft_clip": 0.0, "clip_range": 0.1, "kl_beta": 0.3}
    algorithm, rollout = algorithms.load("vgrpo", options), finished()
    others = {"old": OLD, "reference": REFERENCE}
    loss, figures = loss_of(algorithm, rollout, POLICY, others)
    sigma, a = SIGMAS[STEP], np.asarray(ADVANTAGE)
    new, old = (
        sigma * error / size for error, size in (errors(rollout, p, sigma) for p in (POLICY, OLD))
    )
    ratio = np.exp(old - new)
    policy = np.maximum(-a * ratio, -a * ratio.clip(0.9, 1.1))
    np.testing.assert_allclose(figures["policy_loss"], policy, rtol=1e-3)
    level = jnp.full(4, sigma)
    _, v, _, _ = matching(rollout, STEP, level, POLICY)
    _, v_ref, _, _ = matching(rollout, STEP, level, REFERENCE)
    kl = np.square(sigma * (v - v_ref)).mean((1, 2, 3))
    np.testing.assert_allclose(loss, policy + 0.3 * kl, rtol=1e-3)


@pytest.mark.parametrize("weighting", ["exp", "softmax"])
def test_rwr_by_hand(weighting):
    """exp(A / 2), and 2 e^(A_i / 2) / (the sum over a group of two)."""
    algorithm = algorithms.load("rwr", {"temperature": 2.0, "weighting": weighting, "kl_beta": 0.5})
    rollout, others = finished(), {"reference": REFERENCE}
    loss, figures = loss_of(algorithm, rollout, POLICY, others, group_size=2, term=0)
    sigma = renoise.renoise_logit_normal(setup_of(algorithm), rollout, jnp.int32(0)).sigma
    weight = np.exp(np.asarray(ADVANTAGE) / 2)
    if weighting == "softmax":
        weight = 2 * weight / np.repeat(weight.reshape(2, 2).sum(1), 2)
    wanted = weight * errors(rollout, POLICY, sigma, 0)[0]
    np.testing.assert_allclose(figures["policy_loss"], wanted, rtol=1e-4)
    np.testing.assert_allclose(loss, wanted + 0.5 * figures["kl"], rtol=1e-5)


@pytest.mark.parametrize(
    "name, options", [("rwr", {}), ("rwr", {"weighting": "softmax"}), ("orw", {"alpha": 0.0})]
)
def test_an_image_without_a_score_has_no_weight_in_a_regression(name, options):
    """The others of its group have what they would have without it, and nobody learns from it."""
    algorithm = algorithms.load(name, options)
    given = jnp.where(jnp.arange(4) == 1, algorithm.unscored, ADVANTAGE)
    rest = {"group_size": 2, "term": 0}
    found = loss_of(algorithm, finished(), POLICY, {}, advantage=given, **rest)[1]["policy_loss"]
    alone = loss_of(algorithm, finished(), POLICY, {}, **rest)[1]["policy_loss"]
    assert found[1] == 0
    np.testing.assert_allclose(found[2:], alone[2:], rtol=1e-5)
    nobody = jnp.full(4, algorithm.unscored)
    grads = gradient(name, options, advantage=nobody, **rest)
    assert all((np.asarray(g) == 0).all() for g in grads.values())


def test_orw_is_rwr_at_other_levels_with_the_distance():
    options = {"temperature": 0.5, "alpha": 0.7, "levels": 8}
    loss, figures = loss_of(
        algorithms.load("orw", options), finished(), POLICY, {"reference": REFERENCE}
    )
    level = jnp.full(4, SIGMAS[STEP])
    _, v, _, _ = matching(finished(), STEP, level, POLICY)
    _, v_ref, _, _ = matching(finished(), STEP, level, REFERENCE)
    error = errors(finished(), POLICY, SIGMAS[STEP])[0]
    wanted = np.exp(np.asarray(ADVANTAGE) * 2) * error
    wanted += 0.7 * np.square(v - v_ref).mean((1, 2, 3))
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    assert (figures["policy_loss"] < loss).all()
