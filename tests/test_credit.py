"""The credit of an epoch's images where some have no valid score."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import advantages, algorithms
from flowgrpo_jax.training import credit


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
    given = values, np.ones_like(values), np.arange(2)
    _, found = credit.assign(run, State({}), *given, (), np.zeros(0))
    root = np.sqrt(1.5)
    np.testing.assert_allclose(found, [root, wanted, -root, 0, 0, 0, 0, 0], atol=1e-3)
    assert jnp.isfinite(found).sum() == (8 if wanted == 0 else 7)
