"""Neighbor GRPO: neighbouring noises, the distances that stand for a policy, and its gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from linear_policy import IMAGES, KEY, SHAPE, SIGMAS, draw, gradient_of, linear, setup_of, weights
from scipy.special import log_softmax

from flowgrpo_jax import algorithms, programs, sharding
from flowgrpo_jax.algorithms import neighbor
from flowgrpo_jax.sampling.branching import Branches
from flowgrpo_jax.sampling.sampler import Process
from flowgrpo_jax.types import Credit, Pictures

ADVANTAGE = jnp.asarray([-2.0, 1.0, 0.25, 0.75, 1.5, -0.5, -1.25, 0.25])  # two groups of four


def load(**options):
    return algorithms.load("neighbor", {"anchors": 3, "steps": 2} | options)


def drawn(algorithm, params):
    """A rollout whose groups are close together, so that no candidate is out of reach."""
    setup = setup_of(algorithm)
    rollout = draw(partial(linear, params), setup.process)
    return setup, rollout.replace(x=0.2 * rollout.x)


def test_log_prob_by_hand():
    """Squared distances 1 and 4 of the step's end to two candidates of three pixels."""
    candidates = jnp.zeros((2, 1, 3, 1)).at[0, 0, 0].set(1.0).at[1, 0, 1].set(2.0)
    found = neighbor.log_prob(jnp.zeros((1, 1, 3, 1)), candidates, 2)
    np.testing.assert_allclose(found, [[log_softmax([-1.0, -4.0])]], rtol=1e-6)


def test_on_policy_the_gradient_leads_to_better_candidates():
    """With Euler's steps the ends are the candidates, and by a bias b the step's end moves by
    (sigma' - sigma) sigma b: the gradient of -A log p is known in closed form."""
    algorithm, params = load(steps=1), weights(0)
    setup, rollout = drawn(algorithm, params)
    # The recorded step must be one of the policy: take it from the latents before.
    (term,) = algorithm.terms(setup, KEY)
    sigma, sigma_next = SIGMAS[term], SIGMAS[term + 1]
    x = rollout.x[term]
    after = x + (sigma_next - sigma) * linear(params, x, sigma)
    rollout = rollout.replace(x=rollout.x.at[term + 1].set(after))
    rows = np.asarray(neighbor.draw_anchors(rollout, term, 4, 3))
    assert [sorted(set(r // 4 for r in part)) for part in rows.reshape(2, 3)] == [[0], [1]]
    ends, wanted = np.asarray(after, np.float64), np.zeros(3)
    for j in rows:
        group = np.arange(j // 4 * 4, j // 4 * 4 + 4)
        candidates, a = ends[group], np.asarray(ADVANTAGE)[group]
        p = np.exp(log_softmax(-np.square(ends[j] - candidates).sum((1, 2, 3))))
        centred = candidates - np.tensordot(p, candidates, 1)
        slope = -2 / 4 * np.tensordot(a, centred, 1)  # of the loss, by the end
        wanted += slope.sum((0, 1)) * (sigma_next - sigma) * sigma / len(rows)
    found, figures = gradient_of(algorithm, setup, params, {}, rollout, ADVANTAGE)
    np.testing.assert_allclose(found["b"], wanted, rtol=1e-3, atol=1e-5)
    assert figures["ratio_gap"] == 0


def test_the_ratio_is_to_the_policy_before_the_epoch():
    algorithm, params = load(clip_range=0.2), weights(0)
    setup, rollout = drawn(algorithm, params)
    same, other = (
        gradient_of(algorithm, setup, params, {"old": weights(i)}, rollout, ADVANTAGE)
        for i in (0, 1)
    )
    assert same[1]["ratio_gap"] < 1e-5 < 0.01 < other[1]["ratio_gap"]
    plain, _ = gradient_of(load(), setup, params, {}, rollout, ADVANTAGE)
    for name in "wb":
        np.testing.assert_allclose(same[0][name], plain[name], rtol=1e-4, atol=1e-6)


def test_only_the_anchors_have_a_forward_pass():
    algorithm = load(anchors=1)
    setup, rollout = drawn(algorithm, weights(0))
    seen = []

    def velocity(x, sigma, rows):
        seen.append((x.shape[0], rows.shape))
        return linear(weights(0), x, sigma)

    algorithm.loss(setup, {"policy": velocity}, rollout, jnp.int32(3), Credit(ADVANTAGE))
    assert seen == [(IMAGES // 4, (IMAGES // 4,))]


def test_every_image_is_an_anchor_about_as_often():
    rollout = draw(lambda x, sigma: x, Process(SIGMAS, path=True), count=400)
    counts = np.zeros(4)
    for term in range(4):
        counts += np.bincount(np.asarray(neighbor.draw_anchors(rollout, term, 4, 2)) % 4)
    np.testing.assert_allclose(counts, 200, rtol=0.25)


def test_neighbouring_noises():
    """All have unit variance; within a group their correlation is 1 - s^2, between groups 0."""

    def still(policy, frozen, x, sigma, cond, empty, prompt):
        return jnp.zeros_like(x)

    def decode(params, latents):
        return Pictures(latents, jnp.ones(latents.shape[0], bool))

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    ids, places = np.repeat([3, 8], 4), np.tile(np.arange(4), 2)

    def noises(spread):
        sample = programs.sample(
            still,
            decode,
            mesh,
            Process((1.0, 0.5, 0.0), branches=Branches(1 if spread else 4)),
            latent=(32, 32, 4),
            neighbor_noise=spread,
            score=None,
        )
        given = {"transformer": {}, "vae": {}}
        rollout, _, _ = sample({}, given, {}, {}, KEY, 0, 0, ids, ids, places)
        return np.asarray(rollout.latents).reshape(8, -1)

    found = np.corrcoef(noises(0.6))
    wanted = np.kron(np.eye(2), np.full((4, 4), 0.64)) + 0.36 * np.eye(8)
    np.testing.assert_allclose(found, wanted, atol=0.06)
    np.testing.assert_allclose(noises(0.6).std(1), 1, atol=0.05)
    shared = noises(0.0)
    np.testing.assert_array_equal(shared[:4], shared[:1].repeat(4, 0))
    assert SHAPE != (32, 32, 4) and np.abs(shared[0] - shared[4]).max() > 1
