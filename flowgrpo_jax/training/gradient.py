"""The gradient of one optimiser step, summed over the micro-batches of an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from flowgrpo_jax import sharding, update
from flowgrpo_jax.assembly.run import Run
from flowgrpo_jax.sampling import taped
from flowgrpo_jax.types import Conditioning, Credit, Rollout, TrainState


def of_update(
    run: Run,
    state: TrainState,
    cond: Conditioning,
    rollouts: Sequence[Rollout],
    credits: Sequence[Credit],
    terms: jax.Array,
    reward_inputs: dict[str, Any],
    number: int,
    check: Callable[[], None],
) -> update.Carry:
    """Return the gradient of the epoch's update `number`, and the sums of its figures.

    Args:
      rollouts, credits: of each micro-batch of the epoch, as `credit.cut` cuts it.
      terms: i32 [K], what the algorithm sums its loss over.
      reward_inputs: what an algorithm that differentiates the rewards takes them from.
      check: called before each micro-batch; raises Stopped where the run is to stop.
    """
    plan = run.plan
    others = {name: run.named_policy(state, name) for name in run.algorithm.reads}
    gradient, sums = update.empty(run.algorithm, run.setup, state.policy)
    for m in range(number * plan.micro_batches, (number + 1) * plan.micro_batches):
        check()
        # The program may return them in another layout, for which it would be compiled again.
        gradient, sums = run.put((gradient, sums))
        before = sums
        gradient, sums = run.programs.accumulate(
            gradient,
            sums,
            state.policy,
            others,
            run.model.base,
            cond,
            run.empty,
            taped.usable(rollouts[m]),
            sharding.split_rows(run.mesh, credits[m], axis=-1),
            terms,
            reward_inputs,
        )
        jax.block_until_ready(before)  # two at a time, as in sampling
    return gradient, sums
