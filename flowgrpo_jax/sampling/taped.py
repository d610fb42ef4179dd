"""A rollout that keeps its forward passes in the window, so that the gradient needs no others.

Where an epoch has one optimiser step, the policy that is trained is the one that drew the images:
the update would compute the same velocities again. A rollout with a tape keeps them, and what their
backward pass needs, until the advantages are known (LeanGRPO's "Retain"; written from notes of the
paper, without its code). A trained transition then takes one forward pass in place of two. The tape
holds the results of the window's matrix products for all images of the epoch, and for each
micro-batch a copy of the frozen kernels that the backward pass reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.sampling.sampler import SDE_KEY, Carry, Process
from flowgrpo_jax.types import Params, Rollout, Tape


def rollout(
    velocity: Callable[[Params, jax.Array, jax.Array], jax.Array],
    policy: Params,
    process: Process,
    x: jax.Array,
    keys: jax.Array,
    start: jax.Array,
    prompt: jax.Array,
    tail: jax.Array | int = 0,
) -> Rollout:
    """Sample M images as `sampler.rollout` does, of a process with a window and no branches.

    Args:
      velocity: v(policy, x [M, H, W, C], sigma) -> f32 [M, H, W, C].
    """
    start = jnp.asarray(start, jnp.int32)
    sigmas, end = process.schedule(start, tail), start + process.window

    def step(v: jax.Array, carry: Carry, t: jax.Array):
        noise = sampler.normal(keys, SDE_KEY + t, x.shape[1:])
        return sampler.take_step(process, sigmas, start, carry, t, v, noise)

    def without_tape(t: jax.Array, carry: Carry) -> Carry:
        return step(velocity(policy, carry[0], sigmas[t]), carry, t)[0]

    # The results of matrix products are kept, all else is computed again: a sixth of the memory.
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    velocity_on_tape = jax.checkpoint(velocity, policy=products)

    def window(policy: Params, carry: Carry):
        def with_tape(carry: Carry, t: jax.Array):
            v = velocity_on_tape(policy, carry[0], sigmas[t])
            carry, recorded = step(jax.lax.stop_gradient(v), carry, t)
            return carry, (v, *recorded)

        carry, (v, *recorded) = jax.lax.scan(with_tape, carry, start + jnp.arange(process.window))
        return v, (carry, recorded)

    begun = jax.lax.fori_loop(0, start, without_tape, (x, process.solver.begin(x)))
    v, pullback, (carry, (xs, log_prob)) = jax.vjp(
        partial(window, carry=begun), policy, has_aux=True
    )
    last, _ = jax.lax.fori_loop(end, (sigmas > 0).sum(), without_tape, carry)
    xs = jnp.concatenate([begun[0][None], xs])
    return Rollout(last, prompt, keys, start, xs, log_prob, Tape(v, pullback))


def usable(rollout: Rollout) -> Rollout:
    """Return the rollout without its tape where an image is not finite.

    The activations of such an image would make the whole gradient NaN.
    """
    if rollout.tape is None or _finite((rollout.latents, rollout.x)):
        return rollout
    return replace(rollout, tape=None)


@jax.jit
def _finite(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()
