"""The order in which the boxes of a text detector are read: line after line, left to right.

Boxes are on one line if their heights overlap. A limit in pixels, such as that of RapidOCR's own
sort, depends on the size of the picture, and takes a line that rises a little for two lines.
"""

from __future__ import annotations

import numpy as np

OVERLAP = 0.5  # of the lower box's height: what boxes of one line share at least


def reading_order(boxes: np.ndarray) -> list[int]:
    """Indices of boxes in reading order.

    The slope that the boxes have on average, weighted by their widths, is taken off first. Then
    every box, from left to right, goes to the line whose last box it shares most of its height
    with, or begins a line.

    Args:
      boxes: [n, 4, 2], corners (x, y) in px, y downwards: upper left, upper right, lower right,
        lower left.
    """
    corners = np.asarray(boxes, np.float64).reshape(-1, 4, 2)
    if not len(corners):
        return []
    run, rise = (corners[:, [1, 2]] - corners[:, [0, 3]]).sum((0, 1))
    level = corners[..., 1] - corners[..., 0] * (rise / run if run > 0 else 0.0)
    top, bottom, left = level[:, :2].mean(1), level[:, 2:].mean(1), corners[..., 0].min(1)

    def shared(a: int, b: int) -> float:
        """The part of the lower of two boxes' heights that both have."""
        both = min(bottom[a], bottom[b]) - max(top[a], top[b])
        return both / max(min(bottom[a] - top[a], bottom[b] - top[b]), 1e-6)

    lines: list[list[int]] = []
    for box in map(int, np.argsort(left, kind="stable")):
        nearest = max(lines, key=lambda line: shared(line[-1], box), default=[])
        if nearest and shared(nearest[-1], box) >= OVERLAP:
            nearest.append(box)
        else:
            lines.append([box])
    lines.sort(key=lambda line: float(np.mean(top[line] + bottom[line])))
    return [box for line in lines for box in line]
