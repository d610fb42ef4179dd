"""From noise to latents: the guided velocity, the stochastic rollout, and the ODE.

The rollout is one `lax.scan`. Steps inside the SDE window are drawn from a transition kernel and
stored with their log-prob; steps outside are steps of an ODE solver and leave nothing behind
(MixGRPO, arXiv 2507.21802; Flow-GRPO-Fast).

As in MixGRPO's code a multistep solver remembers what was predicted at the window's last step.
Other than there, it also takes the steps before the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.sampling import sde, solvers
from flowgrpo_jax.sampling.branching import ALONE, Branches, Nodes, once_a_node
from flowgrpo_jax.types import Rollout

# What keys are folded with. An image's key: for its first noise, for the noise of step t
# (SDE_KEY + t), where a finished image is noised again, for the noise and the level, for its own
# part of a first noise that its group shares, and for the anchors of the group that it begins.
ODE_KEY, SDE_KEY = 0, 1
RENOISE_KEY, LEVEL_KEY, OWN_KEY, ANCHOR_KEY = (2**30 + i for i in range(4))
# For the base's own samples an image's key, and for the levels of a loss on data an epoch's.
DATA_KEY = 2**30 + 4
# An epoch's key: for the window's place, and for the terms that are trained.
WINDOW_KEY, TERMS_KEY = 2**31 - 1, 2**31 - 2

Carry = tuple[jax.Array, solvers.Memory]  # latents f32 [M, H, W, C], and what the solver remembers


@dataclass(frozen=True)
class Process:
    """The stochastic process of a recipe: its schedule, kernel and window. Static under jit.

    The sigmas after the window may depend on where it lies: `by_start` then has a whole schedule
    for each start, equal to `sigmas` up to the window's end (`tails.compressed`). A shorter one
    ends in further zeros; nothing is computed there. With `tails` ways to go on after the window it
    has such schedules for each of them, one way after the other (`tails.strided`).
    """

    sigmas: tuple[float, ...]  # T + 1 of them
    kernel: sde.Kernel = sde.FLOW_SDE
    noise_level: float = 0.7
    window: int = 0  # number of stochastic steps, W
    path: bool = False  # whether a rollout by the plain ODE keeps all its latents
    density: str = "gaussian"
    reduction: str = "mean"
    solver: solvers.Solver = solvers.EULER
    by_start: tuple[tuple[float, ...], ...] = ()
    tails: int = 1
    span: tuple[int, int] | None = None  # the steps [low, high) among which windows lie, if not
    # the window's alone
    branches: Branches = ALONE

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def recorded(self) -> int:
        """The number of steps between whose latents a rollout keeps: `Rollout.x` has one more."""
        return self.steps if self.path else self.window

    def schedule(self, start: jax.Array, tail: jax.Array | int = 0) -> jax.Array:
        """Return the sigmas of a rollout whose window begins at `start`."""
        if not self.by_start:
            return jnp.asarray(self.sigmas, jnp.float32)
        row = tail * (len(self.by_start) // self.tails) + start
        return jnp.asarray(self.by_start, jnp.float32)[row]

    def transition(self, x: jax.Array, v: jax.Array, step: jax.Array, **drawn: jax.Array):
        """Draw (`noise=`) or score (`x_next=`) the transition of a step."""
        sigmas = jnp.asarray(self.sigmas, jnp.float32)
        return sde.transition(
            self.kernel,
            x,
            v,
            sigmas[step],
            sigmas[step + 1],
            noise_level=self.noise_level,
            sigma_max=self.sigmas[1],
            density=self.density,
            reduction=self.reduction,
            **drawn,
        )


@lru_cache(maxsize=32)  # programs of the same model and scale are then the same as well
def guided(
    velocity: Callable[..., jax.Array], scale: float, kind: str = "branch"
) -> Callable[..., jax.Array]:
    """Return the guided velocity of a model.

    Args:
      kind: "branch", classifier-free guidance: v = v_empty + scale (v_prompt - v_empty), both in
        one batch. As in diffusers a scale of at most 1 means none: the empty prompt's branch is not
        computed. "input": the scale is an input of the network. "none": the scale has no meaning.

    Returns f(policy, frozen, x [M, H, W, C], sigma scalar or [M], cond, empty, prompt i32 [M]) ->
    f32 [M, H, W, C], where `cond` is a tree of arrays [P, ...] for P prompts, `empty` the same for
    the empty prompt, and `prompt` each image's row in `cond`.
    """

    def single(policy, frozen, x, sigma, cond, empty, prompt):
        del empty
        sigmas = jnp.broadcast_to(sigma, x.shape[:1])
        given = (jnp.full(x.shape[:1], scale, jnp.float32),) if kind == "input" else ()
        return velocity(policy, frozen, x, sigmas, jax.tree.map(lambda c: c[prompt], cond), *given)

    def double(policy, frozen, x, sigma, cond, empty, prompt):
        # Each image's two branches side by side: put end to end they would have to move between
        # devices, which hold a part of the rows each.
        def both(e: jax.Array, c: jax.Array) -> jax.Array:
            pair = jnp.stack([jnp.broadcast_to(e, c.shape), c], axis=1)
            return pair.reshape(2 * c.shape[0], *c.shape[1:])

        sigmas = jnp.broadcast_to(sigma, x.shape[:1])
        pairs = jax.tree.map(lambda e, c: both(e, c[prompt]), empty, cond)
        v = velocity(policy, frozen, both(x, x), both(sigmas, sigmas), pairs)
        v_empty, v_prompt = jnp.moveaxis(v.reshape(-1, 2, *v.shape[1:]), 1, 0)
        return v_empty + scale * (v_prompt - v_empty)

    return double if kind == "branch" and scale > 1.0 else single


def image_keys(key: jax.Array, epoch: int, prompt_ids: jax.Array, images: jax.Array) -> jax.Array:
    """A key per image, folded from (run key, epoch, prompt, image): independent of any layout.

    Args:
      prompt_ids: i32 [M], each image's prompt; images: i32 [M], its place in the group.
    """
    key = jax.random.fold_in(key, epoch)
    fold = jax.vmap(lambda p, i: jax.random.fold_in(jax.random.fold_in(key, p), i))
    return fold(prompt_ids, images)


def normal(keys: jax.Array, fold: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal f32 [M, *shape], one draw per image key, folded with `fold`."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, fold), shape))(keys)


def rollout(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    process: Process,
    x: jax.Array,
    keys: jax.Array,
    start: jax.Array,
    prompt: jax.Array,
    tail: jax.Array | int = 0,
    nodes: Nodes | None = None,
) -> Rollout:
    """Sample M images and record the window's transitions; without a window, by the plain ODE,
    and with `process.path` all of its latents.

    Args:
      velocity: v(x [M, H, W, C], sigma) -> f32 [M, H, W, C].
      x: initial noise f32 [M, H, W, C].
      keys: [M] image keys; step t draws from fold_in(key, SDE_KEY + t).
      start: i32, first stochastic step; the window is [start, start + process.window).
      prompt: i32 [M], kept with the rollout.
      tail: i32, which of the process's ways goes on after the window.
      nodes: the images that share a part of their path, of a process with branches; `velocity` is
        then also given M / n images, the first of every n.
    """
    start = jnp.asarray(start, jnp.int32)
    if not process.window:
        last, path = solve(velocity, process.sigmas, x, process.solver, keep=process.path)
        xs = last[None] if path is None else jnp.concatenate([x[None], path])
        return Rollout(last, prompt, keys, start, xs, jnp.zeros((0, x.shape[0])))
    sigmas, branches = process.schedule(start, tail), process.branches

    def velocity_and_noise(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        if nodes is None:
            return velocity(x, sigmas[t]), normal(keys, SDE_KEY + t, x.shape[1:])
        level, after = (branches.level(step, start) for step in (t, t + 1))
        v = once_a_node(velocity, nodes.sizes, level, x, sigmas[t])
        scale = jnp.where(after > level, branches.noise, 1.0)
        return v, scale * normal(nodes.keys[after], SDE_KEY + t, x.shape[1:])

    def step(carry: Carry, t: jax.Array):
        return take_step(process, sigmas, start, carry, t, *velocity_and_noise(carry[0], t))

    def done(carry: Carry, t: jax.Array):
        return carry, (carry[0], jnp.zeros(x.shape[0]))

    def step_or_done(carry: Carry, t: jax.Array):
        return jax.lax.cond(sigmas[t] > 0, step, done, carry, t)

    (last, _), (xs, log_probs) = jax.lax.scan(
        step_or_done if process.by_start else step,
        (x, process.solver.begin(x)),
        jnp.arange(len(sigmas) - 1),
    )
    xs = jnp.concatenate([x[None], xs])
    return Rollout(
        latents=last,
        prompt=prompt,
        keys=keys,
        start=start,
        x=jax.lax.dynamic_slice_in_dim(xs, start, process.window + 1),
        log_prob=jax.lax.dynamic_slice_in_dim(log_probs, start, process.window),
    )


def take_step(
    process: Process,
    sigmas: jax.Array,
    start: jax.Array,
    carry: Carry,
    t: jax.Array,
    v: jax.Array,
    noise: jax.Array,
) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
    """Go from the latents before step t to those after it, f32 [M, H, W, C], by a velocity.

    Returns the new carry, and with it these latents and the transition's log-prob f32 [M].
    """
    x, memory = carry
    drawn = process.transition(x, v, t, noise=noise)
    inside = (t >= start) & (t < start + process.window)
    x_next, memory = process.solver.step(memory, x, v, sigmas[t], sigmas[t + 1])
    x_next = jnp.where(inside, drawn.x_next, x_next)
    return (x_next, memory), (x_next, drawn.log_prob)


def ode(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    sigmas: np.ndarray | jax.Array | tuple[float, ...],
    x: jax.Array,
    solver: solvers.Solver = solvers.EULER,
) -> jax.Array:
    """Deterministic sampling: noise [M, H, W, C] -> latents [M, H, W, C]."""
    return solve(velocity, sigmas, x, solver)[0]


def solve(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    sigmas: np.ndarray | jax.Array | tuple[float, ...],
    x: jax.Array,
    solver: solvers.Solver = solvers.EULER,
    *,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Sample as `ode` does. With `keep` the latents after each step [T, M, H, W, C] come along."""

    def step(carry: tuple[jax.Array, solvers.Memory], pair: tuple[jax.Array, jax.Array]):
        x, memory = carry
        sigma, sigma_next = pair
        x, memory = solver.step(memory, x, velocity(x, sigma), sigma, sigma_next)
        return (x, memory), x if keep else None

    sigmas = jnp.asarray(sigmas, jnp.float32)
    (last, _), xs = jax.lax.scan(step, (x, solver.begin(x)), (sigmas[:-1], sigmas[1:]))
    return last, xs


def epoch_key(key: jax.Array, epoch: int, fold: int) -> jax.Array:
    """Return the key of a choice that all images of an epoch share, from (run key, epoch)."""
    return jax.random.fold_in(jax.random.fold_in(key, epoch), fold)
