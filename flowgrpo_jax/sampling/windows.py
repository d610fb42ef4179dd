"""Windows: the steps of an epoch's rollouts that are stochastic. One row each in `TABLE`.

A row says where in its range an epoch's window lies. It gives the window's first step as a pure
function of the run's key and the epoch, so that all groups, all hosts and a resumed run agree. The
parts of an epoch may have windows of their own: of TempFlow-GRPO (arXiv 2508.04324) each has the
same prompts at another step, of Flash-GRPO (2605.15980) other prompts.

Source: MixGRPO (arXiv 2507.21802), with the constants of Tencent-Hunyuan/MixGRPO, whose high is the
number of steps less 2, and whose iteration is an epoch here.

Deviation from there: a window keeps its size, so that its last place is high - window. Upstream
moves on to high, trains the steps that are left, and at high none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax import tables
from flowgrpo_jax.sampling import sampler


class Window(NamedTuple):
    """`size` stochastic steps in a row, among the steps [low, high) of a rollout."""

    size: int
    low: int
    high: int


# (run key, epoch, part=0, parts=1) -> i32, the first step of the window of one of an epoch's parts
Start = Callable[..., jax.Array]

TABLE = {
    "random": "flowgrpo_jax.sampling.windows:uniform",
    "distinct": "flowgrpo_jax.sampling.windows:distinct",
    "each": "flowgrpo_jax.sampling.windows:each",
    "frozen": "flowgrpo_jax.sampling.windows:frozen",
    "progressive": "flowgrpo_jax.sampling.windows:progressive",
    "decay": "flowgrpo_jax.sampling.windows:decay",
    "exp_decay": "flowgrpo_jax.sampling.windows:exp_decay",
}


def load(name: str, options: Mapping[str, Any], window: Window) -> Start:
    """Return the start of a row's windows, or of "package.module:make" of the user's own.

    Raises ValueError that names the rows, or the row's options, where one is unknown.
    """
    factory = tables.find(TABLE, name, "sample.window_schedule")
    return tables.make(factory, options, f"sample.window_options of {name}", window=window)


def find(steps: int, size: int, span: Sequence[int]) -> Window:
    """Return the window of a rollout of `steps` steps, the last of which has almost no noise.

    Args:
      size: stochastic steps; 0: as many as there are, which are all but the last.
      span: the range (low, high); (0, 0): the window begins with the first step.

    Raises ValueError that names the knob, the constraint and the fix.
    """
    most, span = steps - 1, tuple(span)
    if len(span) != 2:
        raise ValueError(f"sample.window_range={span}: must be two numbers, such as (0, 5)")
    first = f"the first {most} of {steps} steps (the last one has almost no noise)"
    fixed = span == (0, 0)
    low, high = (0, most) if fixed else span
    if not 0 <= low < high <= most:
        raise ValueError(
            f"sample.window_range={(low, high)}: must lie within {first}; choose 0 <= low < high"
            f" <= {most}, or (0, 0) for a window that begins with the first step"
        )
    asked = f"sample.window={size}" + ("" if size else f", which is all of the {most},")
    size = size or most
    if not 1 <= size <= high - low:
        room = first if fixed else f"sample.window_range={(low, high)}"
        raise ValueError(
            f"{asked} does not fit into {room}: choose 1 to {high - low}"
            + (", or 0 for all of them" if fixed else "")
        )
    return Window(size, 0, size) if fixed else Window(size, low, high)


def uniform(window: Window) -> Start:
    """Each window lies anywhere in the range, with equal probability."""

    def start(key: jax.Array, epoch: int, part: int = 0, parts: int = 1) -> jax.Array:
        key = sampler.epoch_key(key, epoch, sampler.WINDOW_KEY)
        key = jax.random.fold_in(key, part) if part else key
        return jax.random.randint(key, (), window.low, window.high - window.size + 1)

    return start


def distinct(window: Window) -> Start:
    """The windows of an epoch lie anywhere in the range, no two of them in the same place."""
    places = window.high - window.size + 1 - window.low

    def start(key: jax.Array, epoch: int, part: int = 0, parts: int = 1) -> jax.Array:
        _check_places(window, parts)
        key = sampler.epoch_key(key, epoch, sampler.WINDOW_KEY)
        return window.low + jax.random.permutation(key, places)[part]

    return start


def each(window: Window) -> Start:
    """The windows go through all places of the range in order, from part to part and on to the next
    epoch; with as many parts as places every epoch has all of them (TempFlow-GRPO)."""
    places = window.high - window.size + 1 - window.low

    def start(key: jax.Array, epoch: int, part: int = 0, parts: int = 1) -> jax.Array:
        _check_places(window, parts)
        return jnp.asarray(window.low + (epoch * parts + part) % places, jnp.int32)

    return start


def _check_places(window: Window, parts: int) -> None:
    size, low, high = window
    places = high - size + 1 - low
    if parts > places:
        raise ValueError(
            f"sample.windows={parts}: a window of {size} steps has {places} places in"
            f" sample.window_range={(low, high)}; choose at most {places}, or"
            " sample.window_schedule='random'"
        )


def frozen(window: Window) -> Start:
    """The window stays where it is, and is all of its range (MixGRPO-Flash*)."""
    size, low, high = window
    if high - low != size:
        raise ValueError(
            f"sample.window_range={(low, high)} is wider than the window of {size} steps, which"
            f" sample.window_schedule='frozen' does not move: set it to {(low, low + size)}"
        )
    return lambda key, epoch, part=0, parts=1: jnp.int32(window.low)


def progressive(window: Window, every: int = 25, stride: int = 1, roll_back: bool = True) -> Start:
    """The window moves on by `stride` steps after every `every` epochs.

    Args:
      roll_back: go on from the beginning after the last place, or stay there.
    """
    _check_positive("every", every)
    return _moving(window, stride, roll_back, lambda place: every)


def decay(
    window: Window,
    every: int = 25,
    least: int = 6,
    stride: int = 1,
    roll_back: bool = True,
) -> Start:
    """Move like `progressive`, with stays that fall from `every` epochs to `least` at high.

    Upstream's `least` is a quarter of `every`.
    """
    if not 1 <= least <= every:
        raise ValueError(
            f"sample.window_options.least={least}: must be between 1 and every={every}"
        )

    def stay(place: int) -> int:
        return max(least, int(every * (1 - place / window.high) + least * (place / window.high)))

    return _moving(window, stride, roll_back, stay)


def exp_decay(
    window: Window,
    every: int = 25,
    rate: float = 0.1,
    flat: int = 13,
    stride: int = 1,
    roll_back: bool = True,
) -> Start:
    """Move like `progressive`, with stays of every exp(-rate max(step - flat, 0)) epochs, rounded
    up."""
    _check_positive("every", every)
    if not rate >= 0:
        raise ValueError(f"sample.window_options.rate={rate}: must be at least 0")

    def stay(place: int) -> int:
        return math.ceil(every * math.exp(-rate * max(place - flat, 0)))

    return _moving(window, stride, roll_back, stay)


def _moving(
    window: Window,
    stride: int,
    roll_back: bool,
    stay: Callable[[int], int],
) -> Start:
    """A window that stays for stay(place) epochs at each of its places, the same for all parts."""
    _check_positive("stride", stride)
    size, low, high = window
    if high - low <= size:
        raise ValueError(
            f"sample.window_range={(low, high)} leaves a window of {size} steps no room to move:"
            " widen it, to (0, sample.steps - 2) as MixGRPO does, or choose"
            " sample.window_schedule='frozen'"
        )
    if stride > (room := high - low - size):
        raise ValueError(
            f"sample.window_options.stride={stride}: a window of {size} steps cannot move that far"
            f" in sample.window_range={(low, high)}; choose 1 to {room}, or a wider range"
        )
    places = np.arange(low, high - size + 1, stride)
    ends = np.cumsum([stay(int(place)) for place in places])
    total = int(ends[-1])

    def start(key: jax.Array, epoch: int, part: int = 0, parts: int = 1) -> jax.Array:
        at = epoch % total if roll_back else jnp.minimum(epoch, total - 1)
        return jnp.asarray(places, jnp.int32)[jnp.searchsorted(ends, at, side="right")]

    return start


def _check_positive(option: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"sample.window_options.{option}={value}: must be at least 1")
