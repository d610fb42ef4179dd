"""The state that a run begins with."""

from __future__ import annotations

import jax

from flowgrpo_jax import update
from flowgrpo_jax.assembly.run import Run
from flowgrpo_jax.training import credit
from flowgrpo_jax.types import TrainState


def initial_state(run: Run) -> TrainState:
    """The state before the first update, on the devices."""
    key = jax.random.key(run.config.seed)
    memory = credit.initial(run)
    # The first weights get no name: in full fine-tuning they are large, and a name would keep them
    # alive.
    state = update.init(
        run.put(run.model.init_trained(key)),
        run.algorithm.copies,
        memory,
        run.optimiser,
        key,
    )
    return run.put(state)
