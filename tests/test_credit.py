"""The credit of an epoch's images where some have no valid score."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import advantages, algorithms
from flowgrpo_jax.scoring.scores import Scores, reward_figures
from flowgrpo_jax.training import credit, lifecycle


@dataclasses.dataclass(frozen=True)
class State:
    memory: dict


@pytest.mark.parametrize("name, wanted", [("grpo", 0.0), ("rwr", -np.inf), ("orw", -np.inf)])
def test_an_image_without_a_score_teaches_nothing(name, wanted):
    """Its advantage is 0, but for losses with weights exp(A), whose weight is then 0."""
    run = SimpleNamespace(
        advantage=advantages.load("group", {}, group_size=4, clip=5.0),
        algorithm=algorithms.load(name, {}),
        features=None,
        control=None,
        put=lambda memory: memory,
    )
    values = np.array([[1.0, np.nan, 0.0, 0.5, 2.0, 2.0, 2.0, 2.0]], np.float32)
    scores = Scores(("any",), values, np.ones_like(values), np.ones(8, bool))
    given = credit.assign(run, State({}), scores, np.arange(2), (), np.zeros(0))[1]
    found = given.advantage
    assert given.kl is None
    root = np.sqrt(1.5)
    np.testing.assert_allclose(found, [root, wanted, -root, 0, 0, 0, 0, 0], atol=1e-3)
    assert jnp.isfinite(found).sum() == (8 if wanted == 0 else 7)


def test_a_run_goes_on_where_exactly_the_share_allowed_has_failed():
    """3 of 10 are 30 %, though 1 - 0.7 is a little more than 0.3 in floats."""
    values = np.array([[np.nan] * 3 + [1.0] * 7], np.float32)
    scores = Scores(("any",), values, np.ones_like(values), np.ones(10, bool))
    failed = reward_figures(credit.rewards(scores), 5)["failed"]
    lifecycle.check_failed(0, failed, 0.0, most=0.3)
    with pytest.raises(lifecycle.RunFailed, match="max_failed"):
        lifecycle.check_failed(0, failed, 0.0, most=0.29)
