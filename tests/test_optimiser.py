"""The optimiser step: what is skipped, averaged, clipped, warmed up and decayed, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grpo_update import KL, start
from linear_policy import close, weights

from flowgrpo_jax import update


def test_a_gradient_that_is_not_finite_changes_nothing():
    tx = update.optimiser(0.1)
    apply = jax.jit(lambda s, g: update.apply_gradient(s, g, tx, 0.9))
    good = weights(1)
    bad = {**good, "b": good["b"].at[1].set(jnp.nan)}
    first, figures = apply(start(weights(0), tx, KL), good)
    assert first.step == 1 and figures["skipped"] == 0
    np.testing.assert_allclose(
        figures["grad_norm"],
        np.linalg.norm(np.concatenate([np.ravel(v) for v in good.values()])),
        rtol=1e-5,
    )
    after, figures = apply(first, bad)
    assert figures["skipped"] == 1 and np.isnan(figures["grad_norm"])
    assert after.key == first.key
    close(after.replace(key=0), first.replace(key=0), rtol=0)
    assert apply(after, good)[0].step == 2


def test_ema_by_hand():
    """Plain descent from 0 by 1 a step; decays 1/10, 2/11, then the cap of 0.2."""
    tx = optax.sgd(1.0)
    state = start({"v": jnp.zeros(1)}, tx, KL)
    expected = 0.0
    for step, decay in enumerate([1 / 10, 2 / 11, 0.2, 0.2], start=1):
        state, _ = update.apply_gradient(state, {"v": -jnp.ones(1)}, tx, ema_decay=0.2)
        expected = decay * expected + (1 - decay) * step
        np.testing.assert_allclose(state.policy["v"], [step])
        np.testing.assert_allclose(state.copies["ema"]["v"], [expected], rtol=1e-6)


@pytest.mark.parametrize(
    "size, limit, kept", [(100.0, 1.0, 1.0), (100.0, 3.0, 3.0), (0.5, 1.0, 0.5)]
)
def test_the_global_norm_is_clipped(size, limit, kept):
    """Adam's first step is lr g / (|g| + eps): with eps = 1 it shows the size of what came in."""
    direction = {"a": jnp.array([0.36, 0.48]), "b": jnp.array([0.8])}  # of norm 1, over both
    tx = update.optimiser(0.1, eps=1.0, weight_decay=0.0, max_grad_norm=limit)
    gradient = jax.tree.map(lambda d: size * d, direction)
    step, _ = tx.update(gradient, tx.init(direction), direction)
    close(step, jax.tree.map(lambda d: -0.1 * kept * d / (kept * d + 1), direction), rtol=1e-4)


def test_warm_up_and_weight_decay():
    """Adam steps by the learning rate; it warms up from its first step on and decays weights."""
    tx = update.optimiser(0.1, warmup_steps=2, weight_decay=0.5)
    params, gradient = {"v": jnp.array([3.0])}, {"v": jnp.array([1.0])}
    state, steps = tx.init(params), []
    for _ in range(4):
        step, state = tx.update(gradient, state, params)
        steps.append(float(step["v"][0]))
    np.testing.assert_allclose(steps, -np.array([0.05, 0.1, 0.1, 0.1]) * (1 + 0.5 * 3), rtol=1e-5)


def test_every_schedule_has_the_same_state():
    """So that a run can go on with another one."""
    schedules = ({}, {"warmup_steps": 2}, {"decay_steps": 4})
    states = [update.optimiser(0.1, **s).init({"v": jnp.zeros(1)}) for s in schedules]
    assert len({str(jax.tree.structure(state)) for state in states}) == 1


def test_the_learning_rate_falls_as_the_inverse_square_root():
    """Adam steps by the learning rate: constant to step 4, then halved at four times that."""
    tx = update.optimiser(0.1, decay_steps=4, weight_decay=0.0)
    params, gradient = {"v": jnp.array([3.0])}, {"v": jnp.array([1.0])}
    state, steps = tx.init(params), []
    for _ in range(17):
        step, state = tx.update(gradient, state, params)
        steps.append(-float(step["v"][0]))
    np.testing.assert_allclose(steps[:5], 0.1, rtol=1e-4)
    np.testing.assert_allclose([steps[9], steps[16]], [0.1 * 2 / 3, 0.05], rtol=1e-4)
    assert np.all(np.diff(steps[4:]) < 0)
