"""GRPO's clipped loss: by hand, on policy and far off it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import algorithms
from flowgrpo_jax.algorithms.trust_regions import clipped


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
