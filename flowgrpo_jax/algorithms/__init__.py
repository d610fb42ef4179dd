"""Algorithms turn images and their advantages into a gradient. Each has one file and one row.

An algorithm looks at every micro-batch K times. One look is a *term*: a recorded transition of the
rollout (coupled algorithms, such as GRPO), or a noise level to which the finished image is noised
again (decoupled algorithms, such as DiffusionNFT and AWM). A term is a number. Whatever else is
random is drawn from the images' own keys, so that nothing depends on how the batch is cut.

To add one: write a file with a function `make(**options) -> Algorithm`, give it a row in `TABLE`,
test it (tests/test_algorithms.py runs over the table). An algorithm of the user's own is named in
the recipe as "package.module:make" and needs no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax

from flowgrpo_jax import tables
from flowgrpo_jax.command_line import recipe_files
from flowgrpo_jax.sampling.sampler import Process

# v(x [M, H, W, C], sigma scalar or [M]) -> f32 [M, H, W, C]: the guided velocity of one policy. A
# third argument, i32 [N], says which N of the micro-batch's images x and the velocity are of.
Velocity = Callable[..., jax.Array]
Velocities = Mapping[str, Velocity]  # by the name of the policy
Figures = dict[str, jax.Array]


@dataclass(frozen=True)
class Setup:
    """The settings by which a run draws its images. Static under jit."""

    process: Process
    group_size: int
    shards: int = 1  # equal parts that a micro-batch is cut into, each on devices of its own


# loss(setup, velocities, rollout, term i32, credit of the term) -> loss [M], {figure: [M]}
# With `reward_gradient` there is a last argument, a Score.
Loss = Callable[..., tuple[jax.Array, Figures]]
# score(latents [M, H, W, C]) -> f32 [N, M], differentiable: the weighted sum of the rewards of the
# decoded images, for each of the algorithm's `texts`
Score = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True, eq=False)  # told apart by identity; `load` caches
class Algorithm:
    """The interface of an algorithm to the trainer. It holds no arrays.

    Attributes:
      loss: one value an image, not reduced; only the velocity of "policy" is differentiated.
      terms: (setup, key of the epoch) -> i32 [K], the terms that an epoch trains.
      figures: the names of the figures that the loss returns.
      draws: the policy whose images are learned from, "policy" or the name of a copy.
      records: what a rollout keeps for the loss beside the images: "window", the transitions of the
        window and their log-probs, so that it needs noise; "path", all latents of the plain ODE; or
        "", nothing.
      reward_gradient: whether the loss differentiates the rewards. It is then called with one more
        argument, a Score, and every reward with a weight has to be differentiable.
      texts: what such an algorithm lets the rewards read, "{}" being the prompt.
      passes: (setup) -> the forward passes of a policy that the loss makes for each image and term.
      reads: further policies that the loss reads: "reference" (before training), "ema", copies.
      copies: copies of the policy that are kept beside the EMA. At the end of an epoch
        copy = decay x copy + (1 - decay) x policy, with decay(begun, step) of the optimiser steps
        taken before the epoch and after it. A copy named "reference" takes the reference's place.
      whole: what a micro-batch has to hold as a whole, because the loss looks at its images
        together: "group", "update" (all images of an update), or "" where the cut is free.
      unscored: the advantage of an image without a valid score. 0 teaches nothing where a loss is
        proportional to it; a loss with weights exp(A) has -inf.
      weighs_kl: whether the loss has a KL to "reference" that `Credit.weigh` weighs. The figure
        "kl" is without this weight.
      worst: figures of which the largest value counts, and not the mean.
      by_step: figures that a run also reports for each step of the rollout.
      warning: (figures of an epoch's first optimiser step) -> a sentence, or "" when all is well.
      summary: one line about the options, for the first lines that a run prints.
    """

    loss: Loss
    terms: Callable[[Setup, jax.Array], jax.Array]
    figures: tuple[str, ...]
    draws: str = "policy"
    records: str = ""
    reward_gradient: bool = False
    texts: tuple[str, ...] = ("{}",)
    passes: Callable[[Setup], float] = lambda setup: 1.0
    reads: tuple[str, ...] = ()
    copies: Mapping[str, Callable[[jax.Array, jax.Array], Any]] = field(default_factory=dict)
    whole: str = ""
    unscored: float = 0.0
    weighs_kl: bool = False
    worst: tuple[str, ...] = ()
    by_step: tuple[str, ...] = ()
    warning: Callable[[Mapping[str, float]], str] = lambda figures: ""
    summary: str = ""


TABLE = {
    "grpo": "flowgrpo_jax.algorithms.grpo:make",
    "nft": "flowgrpo_jax.algorithms.nft:make",
    "awm": "flowgrpo_jax.algorithms.awm:make",
    "dgpo": "flowgrpo_jax.algorithms.dgpo:make",
    "vgrpo": "flowgrpo_jax.algorithms.vgrpo:make",
    "ram": "flowgrpo_jax.algorithms.ram:make",
    "crd": "flowgrpo_jax.algorithms.crd:make",
    "dpo": "flowgrpo_jax.algorithms.dpo:make",
    "sft": "flowgrpo_jax.algorithms.sft:make",
    "rwr": "flowgrpo_jax.algorithms.rwr:make",
    "orw": "flowgrpo_jax.algorithms.orw:make",
    "refl": "flowgrpo_jax.algorithms.refl:make",
    "draft": "flowgrpo_jax.algorithms.draft:make",
    "draft_lv": "flowgrpo_jax.algorithms.draft_lv:make",
    "flowbp": "flowgrpo_jax.algorithms.flowbp:make",
    "srpo": "flowgrpo_jax.algorithms.srpo:make",
    "neighbor": "flowgrpo_jax.algorithms.neighbor:make",
}


def load(name: str, options: Mapping[str, Any]) -> Algorithm:
    """Return the algorithm of a row with its options.

    Raises ValueError that names the rows, or the row's options, where one is unknown.
    """
    return _load(name, tuple(sorted(options.items())))


@lru_cache(maxsize=32)  # programs of the same algorithm are then the same as well
def _load(name: str, options: tuple[tuple[str, Any], ...]) -> Algorithm:
    factory = tables.find(TABLE, name, "algorithm")
    try:
        algorithm = tables.make(factory, dict(options), f"algorithm.options of {name}")
    except ValueError as error:
        if (recipe := f"algorithms/{name}") not in recipe_files.names():
            raise
        raise ValueError(f"{error}; the recipe --config {recipe} sets its options") from None
    return tables.check(algorithm, Algorithm, name)


def used(**weights: float) -> tuple[str, ...]:
    """Return the names of policies whose weight in a loss is not 0, to be read by it."""
    return tuple(name for name, weight in weights.items() if weight)


@lru_cache(maxsize=32)  # as in `_load`
def keep_reference(algorithm: Algorithm) -> Algorithm:
    """Return the algorithm with its reference as a copy, which others move (kl_control.py)."""
    kept = {**algorithm.copies, "reference": lambda begun, step: 1.0}
    return replace(algorithm, copies=kept)
