"""Tails: the steps that are taken after the window, where they are fewer than the schedule has.

  compressed   a share of them (MixGRPO-Flash, arXiv 2507.21802, with the constants of
               Tencent-Hunyuan/MixGRPO)
  strided      every n-th of them, for several n (G2RPO, arXiv 2510.01982; the paper was not at
               hand, the form is that of two notes on it)

Deviation: a compressed tail has at least one step. Upstream's last ones have none and stop above
sigma 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def check(strides: Sequence[int], share: float) -> None:
    """Raise ValueError that names the knob, the constraint and the fix."""
    if min(strides, default=0) < 1:
        raise ValueError(
            f"sample.strides={tuple(strides)}: must be one or more numbers of at least 1, such as"
            " (1, 2, 3)"
        )
    if share != 1 and tuple(strides) != (1,):
        raise ValueError(
            f"sample.strides={tuple(strides)} and sample.tail={share}: both say which steps after"
            " the window are taken; set sample.tail to 1, or sample.strides to (1,)"
        )


def compressed(
    sigmas: Sequence[float], shift: float, size: int, share: float
) -> tuple[tuple[float, ...], ...]:
    """Return a schedule for each start of the window, with fewer steps after it (MixGRPO-Flash).

    The steps after the window lead evenly, in time before the shift, from the window's end to 0.
    With l the window's last step they have int((T - l) share) points, as in upstream's code; that
    is one step fewer than in the paper's text, which has as many steps.

    Args:
      sigmas: T + 1 of them, with the shift f(u) = shift u / (1 + (shift - 1) u).
      size: of the window.

    Returns T - size schedules, filled up with zeros to the same length; none where the share is 1.
    """
    steps = len(sigmas) - 1
    if share == 1:
        return ()
    schedules = []
    for end in range(size, steps):
        points = max(int((steps - end + 1) * share), 2)
        time = np.linspace(sigmas[end] / (shift - (shift - 1) * sigmas[end]), 0, points)
        tail = shift * time / (1 + (shift - 1) * time)
        schedules.append((*sigmas[: end + 1], *map(float, tail[1:])))
    return _filled(schedules)


def strided(
    sigmas: Sequence[float], size: int, strides: Sequence[int]
) -> tuple[tuple[float, ...], ...]:
    """Return a schedule for each stride and each start of the window, the starts of one stride in a
    row, that after the window takes only every stride-th step, and then the last one (G2RPO, arXiv
    2510.01982). None where all strides are 1.

    Args:
      sigmas: T + 1 of them; size: of the window.
    """
    steps = len(sigmas) - 1
    if set(strides) == {1}:
        return ()
    return _filled(
        [
            (*sigmas[:end], *sigmas[end:steps:stride], sigmas[steps])
            for stride in strides
            for end in range(size, steps)
        ]
    )


def _filled(schedules: Sequence[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """Return the schedules with zeros at their ends, all of the same length."""
    longest = max(map(len, schedules))
    return tuple(s + (0.0,) * (longest - len(s)) for s in schedules)
