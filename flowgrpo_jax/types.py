"""Axis letters and records: the vocabulary of the whole package.

    letter   meaning                                                       SD3.5-M at 512 px
    P G B    prompts, images per prompt (group), images: B = P x G,        48 24 1152 an epoch
             group-contiguous
    M        images of a micro-batch: what one device program handles      set by memory
    T W      steps of a rollout; those of its window, stochastic and       10 9
             stored. In shapes with C, W is the latent width
    H W C    latent height, width, channels, channels last                 64 64 16
    S L      image tokens (H/2)(W/2), text tokens (77 CLIP + T5)           1024 205
    E V      text width, pooled text width                                 4096 2048
    D N      model width, heads                                            1536 24
    R        LoRA rank                                                     32

Time comes first and is never transposed. Groups are positions, not strings: reshape to [P, G].
Shapes stay static: a failed reward or a dead group gets weight 0, it is not filtered out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import numpy as np

Params = dict[str, Any]  # flat: path -> array
# Text, encoded once per prompt and never per image: a model's own arrays [P, ...] by their names
Conditioning = dict[str, Any]
Metadata = dict[str, Any]
# {reward: f32 [M]}, unweighted; NaN where a reward failed or does not apply to the prompt
NamedScores = dict[str, Any]


class PromptBatch(NamedTuple):
    """The P prompts of an epoch, on the host."""

    prompts: list[str]
    metadata: list[Metadata]
    ids: np.ndarray  # i32 [P], each prompt's place in its source


class Pictures(NamedTuple):
    """Decoded images.

    An image with pixels that are not finite is decoded to something visible all the same; `finite`
    says that it must not count.
    """

    pixels: jax.Array  # uint8 [M, H, W, 3]
    finite: jax.Array  # bool [M]


@flax.struct.dataclass
class Tape:
    """The forward passes of a rollout's window, kept for their gradient.

    Attributes:
      velocity: f32 [W, M, H, W, C], the policy's at the window's latents.
      pullback: from the gradient by `velocity` to (the gradient by the policy,).
    """

    velocity: jax.Array
    pullback: Callable[[jax.Array], tuple[Params]]


@flax.struct.dataclass
class Rollout:
    """M sampled images, and the transitions of the window exactly as the sampler carried them.

    A rollout by the plain ODE has a window of W = 0 steps. Where its algorithm needs the whole
    path, x holds all T + 1 latents.
    """

    latents: jax.Array  # f32 [M, H, W, C]: x_0, the end of the rollout, to be decoded
    prompt: jax.Array  # i32 [M], row of the epoch's Conditioning
    keys: jax.Array  # [M] image keys: whatever else is drawn for an image is folded from its key
    start: jax.Array  # i32, the window's first step
    x: jax.Array  # f32 [W + 1, M, H, W, C]: the latents between which the window's steps lie
    log_prob: jax.Array  # f32 [W, M], of each of the window's transitions
    tape: Tape | None = None  # of a run that keeps the window's forward passes (sampling/taped.py)


@flax.struct.dataclass
class Credit:
    """How much each image counts: its advantage, and the weight of its KL.

    Attributes:
      advantage: f32 [M], or [W, M] with one value for each transition of the window.
      kl: f32 [M], by which an image's KL is multiplied beside the algorithm's beta; None: by 1.
    """

    advantage: jax.Array
    kl: jax.Array | None = None

    def of_term(self, term: jax.Array) -> Credit:
        """Return the credit of one term, whose advantage is f32 [M]."""
        a = self.advantage
        return Credit(a[term] if a.ndim == 2 else a, self.kl)

    def weigh(self, kl: jax.Array) -> jax.Array:
        """Return the KL [M] of a loss, times each image's own weight where the run gives it one."""
        return kl if self.kl is None else self.kl * kl


@flax.struct.dataclass
class TrainState:
    """The arrays that change in training. The frozen base weights are not part of it."""

    step: jax.Array  # i32, optimiser steps taken
    policy: Params  # what is trained: an adapter or, with lora.rank=0, the transformer itself
    copies: dict[str, Params]  # "ema", which is evaluated, and the copies that an algorithm keeps
    opt_state: Any
    memory: dict[str, Any]  # what the advantages remember of earlier epochs
    key: jax.Array  # the run's root key: every other key is folded from it


class Reward(Protocol):
    """A reward scores images. Higher is better; `valid` is false where it failed.

    It may have an attribute `scope` (see `scope_of`), and the methods `ready()` and
    `check(record)`, which are called before training starts: the first raises when the reward
    cannot work, the second raises ValueError for the metadata of a prompt that it cannot judge.
    """

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [B, H, W, 3], B prompts, B metadata -> (scores f32 [B], valid bool [B])."""
        ...


SCOPES = ("image", "group", "epoch")


def scope_of(reward: Any) -> str:
    """Return which images a reward is given in one call.

    "image": any; it judges each by itself. "group": all images of one prompt of the epoch.
    "epoch": all images of the epoch. A reward without an attribute `scope` judges single images.
    Raises ValueError for another scope.
    """
    scope = getattr(reward, "scope", "image")
    if scope not in SCOPES:
        names = ", ".join(map(repr, SCOPES))
        raise ValueError(f"the reward {reward!r} has scope={scope!r}: choose from {names}")
    return scope


@dataclasses.dataclass(frozen=True)
class GraphReward:
    """A reward computed on the devices, where the images are. It judges each image by itself.

    `prepare` runs on the host, once per prompt. `score` is pure and jitted by the caller, which
    hands it rows: entry i of every array belongs to image i.

    Attributes:
      weights: a tree of arrays, which the caller places.
      prepare: (P prompts, P records) -> arrays [P, ...], on the host.
      score: (weights, images uint8 [M, H, W, 3], prepared rows [M, ...]) -> f32 [M]; a score that
        is not finite counts as failed.
      check: raises ValueError for a record that the reward cannot judge.
      differentiable: whether `score` takes f32 images from 0 to 255 too, with a useful gradient.
      embed: (weights, images uint8 [M, H, W, 3]) -> unit vectors f32 [M, V] of what its tower
        sees; None without one.
    """

    weights: Any
    prepare: Callable[[Sequence[str], Sequence[Metadata]], Any]
    score: Callable[[Any, jax.Array, Any], jax.Array]
    check: Callable[[Metadata], None] = lambda record: None
    differentiable: bool = False
    embed: Callable[[Any, jax.Array], jax.Array] | None = None


class Described(NamedTuple):
    """A GraphReward with the shapes of its weights in their place, to be compiled without them."""

    reward: GraphReward
    inputs: dict[str, jax.ShapeDtypeStruct]  # what `prepare` would return for one prompt
