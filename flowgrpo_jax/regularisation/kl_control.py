"""Control of the KL: by how much an image's KL counts, and when the policy becomes its reference.

A control multiplies each image's KL in the loss of the algorithm, beside the algorithm's own beta.
It remembers earlier epochs, and a checkpoint keeps what it remembers. One row each in `TABLE`; a
row of the user's own is named in the recipe as "package.module:make".

    constant     by 1, for a recipe that only resets its reference
    adaptive     by a factor that holds the KL at a target: the proportional controller of Ziegler
                 et al., 2019 (arXiv 1909.08593, section 2.2)
    uncertain    by 0 but for the uncertain images: GARDO (arXiv 2512.24138)
All of it is arithmetic on the host, over one number an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowgrpo_jax import tables

Memory = dict[str, Any]  # {name: np.ndarray}
HISTORY = 20  # epochs whose uncertainty GARDO compares with


@dataclass(frozen=True)
class Control:
    """A row of the table with its options.

    Attributes:
      weigh: (memory, scores f32 [K, B], weights f32 [K, B]) -> (by what each image's KL is
        multiplied f32 [B], memory). Scores and weights are those that an advantage is given.
      initial: the memory before the first epoch.
      settle: (memory, the KL that the epoch's updates measured) -> memory.
      figures: memory -> figures of the epoch.
    """

    weigh: Callable[[Memory, np.ndarray, np.ndarray], tuple[np.ndarray, Memory]]
    initial: Callable[[], Memory] = dict
    settle: Callable[[Memory, float], Memory] = lambda memory, kl: memory
    figures: Callable[[Memory], dict[str, float]] = lambda memory: {}


TABLE = {
    "constant": "flowgrpo_jax.regularisation.kl_control:constant",
    "adaptive": "flowgrpo_jax.regularisation.kl_control:adaptive",
    "uncertain": "flowgrpo_jax.regularisation.kl_control:uncertain",
}


def load(
    name: str,
    options: Mapping[str, Any],
    names: Sequence[str],
    *,
    reset_above: float = 0.0,
    reset_every: int = 0,
) -> Control:
    """Return the control of a row.

    Args:
      names: of the K rewards, in the order of the scores.
      reset_above, reset_every: `resetting` has them.

    Raises ValueError that names the rows, or the row's options, where one is unknown.
    """
    factory = tables.find(TABLE, name, "kl")
    made = tables.make(factory, options, f"kl.options of {name}", names=tuple(names))
    control = tables.check(made, Control, name)
    return resetting(control, reset_above, reset_every)


def check(
    weights: Mapping[str, float],
    weighs_kl: bool,
    resets_itself: bool,
    *,
    name: str,
    options: Mapping[str, Any],
    reset_above: float,
    reset_every: int,
) -> None:
    """Raise ValueError for settings of a control that are wrong or would not be followed.

    Args:
      weights: of the training rewards; weighs_kl: whether the algorithm has a KL that can be
        weighed; resets_itself: whether it resets its reference by an option of its own.
    """
    resets = reset_above or reset_every
    if not name and (options or resets):
        raise ValueError(
            "kl.options, kl.reset_above and kl.reset_every need a row: set kl.name, to 'constant'"
            " for resets alone"
        )
    if name and not weighs_kl:
        raise ValueError(
            f"kl.name={name!r}: the algorithm has no KL to control; give its option kl_beta (in nft"
            " anchor, in orw alpha) a weight above 0, or choose another algorithm"
        )
    if resets and resets_itself:
        raise ValueError(
            "kl.reset_above and kl.reset_every beside algorithm.options.reset_every: set one kind"
            " of reset, and the other to 0"
        )
    if name:
        load(name, options, tuple(weights), reset_above=reset_above, reset_every=reset_every)
    trained = [reward for reward in options.get("auxiliaries") or () if weights.get(reward)]
    if name == "uncertain" and (trained or all(weights.values())):
        raise ValueError(
            f"kl.name='uncertain' watches rewards of weight 0, and reward.weights={dict(weights)}"
            f" trains on {', '.join(trained) or 'all of them'}: watch others, with the weight 0"
        )


# ----------------------------------------------------------------------------------- the rows


def constant(names: Sequence[str]) -> Control:
    """Every image's KL counts alike."""
    return Control(lambda memory, scores, weights: (np.ones(scores.shape[1], np.float32), memory))


def adaptive(
    names: Sequence[str], target: float = 1e-3, rate: float = 0.1, limit: float = 0.2
) -> Control:
    """A factor on all images' KL that grows while the measured KL is above the target.

    After an epoch: factor x (1 + rate x e), e = (KL / target - 1) cut to [-limit, limit].

    Args:
      target: of the figure "kl", in its units: it depends on the algorithm and on
        `sample.reduction`, so look at a run's figure before choosing.
    """
    for name, value in {"target": target, "rate": rate, "limit": limit}.items():
        if not value > 0:
            raise ValueError(f"kl.options.{name}={value}: must be above 0")

    def weigh(memory: Memory, scores: np.ndarray, weights: np.ndarray):
        return np.full(scores.shape[1], memory["factor"], np.float32), memory

    def settle(memory: Memory, kl: float) -> Memory:
        if not np.isfinite(kl):
            return memory
        error = np.clip(kl / target - 1, -limit, limit)
        return memory | {"factor": np.float32(memory["factor"] * (1 + rate * error))}

    return Control(
        weigh,
        lambda: {"factor": np.float32(1)},
        settle,
        lambda memory: {"kl_factor": float(memory["factor"])},
    )


def uncertain(
    names: Sequence[str],
    auxiliaries: Mapping[str, float] | None = None,
    share: float = 0.1,
    least: float = 0.02,
    most: float = 0.2,
    rate: float = 0.1,
) -> Control:
    """The KL of uncertain images alone, as a mean over them: GARDO.

    An image's uncertainty u is its rank by the trained reward minus its mean rank by rewards that
    are not trained on, among all images of the epoch; ranks go up with the score. Where u is high
    the trained reward rates the image much higher than the others do. The KL is that of the top
    share of the images with u >= 0. The share adapts: times 1 + rate when the mean u of the images
    with u >= 0 is above all of the last 20 epochs', times 1 - rate when it is below them all.

    Deviations from tinnerhrhe/GARDO: there a rank of 1 is the best image's, so that what is chosen
    are the images that the trained reward likes too little, against what the paper says; here it is
    as the paper means it. Ranks are shares of the images, in (0, 1]; images of equal score share
    their mean rank, and images of equal u are chosen together.

    Args:
      auxiliaries: {reward: 1, or -1 where lower is better}, of rewards with weight 0; all of those,
        without it.
      share: of the images with u >= 0, in the first epoch. least, most: its bounds.
      rate: by which it moves.
    """
    if not 0 < least <= share <= most <= 1:
        raise ValueError(
            f"kl.options: share={share} must lie within least={least} and most={most}, and those in"
            " (0, 1]"
        )
    if not 0 <= rate < 1:
        raise ValueError(f"kl.options.rate={rate}: must be in [0, 1)")
    auxiliaries = auxiliaries or {}
    if unknown := sorted(set(auxiliaries) - set(names)):
        raise ValueError(
            f"kl.options.auxiliaries names {unknown}: give them the weight 0 in reward.weights,"
            f" which has {', '.join(names)}"
        )
    if not {*auxiliaries.values()} <= {1, -1}:
        raise ValueError(f"kl.options.auxiliaries={auxiliaries}: must be 1, or -1 to turn it")
    signs = np.array([auxiliaries.get(name, float(not auxiliaries)) for name in names])

    def weigh(memory: Memory, scores: np.ndarray, weights: np.ndarray):
        u = uncertainty(scores, weights, signs)
        candidates = u[u >= 0]  # NaN is none
        if not candidates.size:
            return np.zeros(len(u), np.float32), memory
        memory = _adapted(memory, candidates.mean(dtype=np.float64), least, most, rate)
        count = int(np.ceil(memory["share"] * candidates.size))
        chosen = u >= np.sort(candidates)[-count]
        return (chosen * len(u) / chosen.sum()).astype(np.float32), memory

    def initial() -> Memory:
        return {"share": np.float32(share), "history": np.full(HISTORY, np.nan, np.float32)}

    return Control(
        weigh, initial, figures=lambda memory: {"uncertain_share": float(memory["share"])}
    )


def uncertainty(scores: np.ndarray, weights: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Return rank(trained reward) - mean rank(auxiliaries) of each image, f64 [B], ranks in (0, 1].

    It is NaN where an image lacks the trained reward, or all auxiliaries.

    Args:
      scores, weights: f32 [K, B]; a reward of weight 0 is an auxiliary where its sign is not 0.
      signs: f64 [K], 1 where a higher score is better and -1 where a lower one is.
    """
    trained = np.nan_to_num(weights) != 0
    parts = np.where(trained, weights * scores, 0.0)  # NaN where a trained reward failed
    main = np.where(trained.any(0), parts.sum(0), np.nan)
    others = [
        ranks(np.where(trained[k], np.nan, sign * scores[k]))
        for k, sign in enumerate(signs)
        if sign and not trained[k].all()
    ]
    if not others:
        return np.where(np.isnan(main), np.nan, 0.0)  # nothing says otherwise: all alike
    known = np.sum(~np.isnan(others), axis=0)
    mean = np.where(known > 0, np.nansum(others, axis=0) / np.maximum(known, 1), np.nan)
    return ranks(main) - mean


def ranks(x: np.ndarray) -> np.ndarray:
    """Return the rank of each value among those that are not NaN, f64 in (0, 1], 1 for the largest.

    Equal values share the mean of their ranks; NaN keeps NaN.
    """
    valid = ~np.isnan(x)
    below = (x[None] < x[:, None]).sum(1)
    alike = (x[None] == x[:, None]).sum(1)
    return np.where(valid, (below + (alike + 1) / 2) / max(valid.sum(), 1), np.nan)


def _adapted(memory: Memory, mean: float, least: float, most: float, rate: float) -> Memory:
    """Move the share by an epoch's mean uncertainty, and remember that."""
    past = memory["history"][~np.isnan(memory["history"])]
    share = memory["share"]
    if past.size and np.float32(mean) > past.max():
        share = share * (1 + rate)
    elif past.size and np.float32(mean) < past.min():
        share = share * (1 - rate)
    history = np.append(memory["history"][1:], np.float32(mean))
    return memory | {"share": np.float32(np.clip(share, least, most)), "history": history}


# -------------------------------------------------------------------------------- the reference


def resetting(control: Control, above: float, every: int) -> Control:
    """Return the control with a reference that follows the policy; `must_reset` says when.

    Args:
      above: the policy becomes its own reference after an epoch whose KL is above this; 0: never.
      every: and after so many epochs with the same reference; 0: never.

    Raises ValueError for negative numbers.
    """
    if not (above >= 0 and every >= 0):
        raise ValueError(
            f"kl.reset_above={above}, kl.reset_every={every}: must be at least 0, which means never"
        )
    if not (above or every):
        return control

    def settle(memory: Memory, kl: float) -> Memory:
        age = memory["age"] + 1
        due = (above and kl > above) or (every and age >= every)
        return control.settle(memory, kl) | {"age": np.int32(0 if due else age)}

    return Control(
        lambda memory, *scores: control.weigh(memory, *scores),
        lambda: control.initial() | {"age": np.int32(0)},
        settle,
        lambda memory: control.figures(memory) | {"reference_age": float(memory["age"])},
    )


def must_reset(memory: Memory) -> bool:
    """Whether the policy is to become its own reference, after `settle`."""
    return "age" in memory and int(memory["age"]) == 0
