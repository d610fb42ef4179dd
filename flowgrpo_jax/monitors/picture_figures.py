"""Statistics of pictures: what is lost when a policy finds a short way to its reward.

Each figure is a mean over pictures. Pictures with a longer side above SIDE are reduced by a whole
factor first, so that the figures cost little beside the drawing; they are compared with figures of
the same run alone, for which that does not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

SIDE = 256  # px
EDGE = 0.1  # change of luma from pixel to pixel, of 1, from which on there is an edge
DARK, BRIGHT = 0.05, 0.97  # luma, of 1
LEVELS = 8  # of each colour channel, for the entropy
LUMA = (0.2126, 0.7152, 0.0722)  # of red, green and blue (ITU-R BT.709)


def statistics(pictures: np.ndarray) -> dict[str, float]:
    """Return the figures of pictures, uint8 [n, H, W, 3], averaged.

    edge_density: share of pixels at an edge. colour_entropy: of the histogram of colours, in bits,
    from 0 (one colour) to 9. brightness: mean luma, 0 to 1. saturation: as in HSV, 0 to 1.
    dark, bright: share of pixels that are almost black, and almost white. sharpness: standard
    deviation of the Laplacian of luma.
    """
    rows = [_of_one(_reduced(picture)) for picture in pictures]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def _reduced(picture: np.ndarray) -> np.ndarray:
    factor = -(-max(picture.shape[:2]) // SIDE)
    return np.asarray(Image.fromarray(picture).reduce(factor)) if factor > 1 else picture


def _of_one(picture: np.ndarray) -> dict[str, float]:
    colours = picture.astype(np.float32) / 255
    luma = colours @ np.asarray(LUMA, np.float32)
    down, right = np.diff(luma, axis=0)[:, :-1], np.diff(luma, axis=1)[:-1]
    middle = luma[1:-1, 1:-1]
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    most, least = colours.max(-1), colours.min(-1)
    return {
        "edge_density": float((np.hypot(down, right) > EDGE).mean()),
        "colour_entropy": entropy(picture),
        "brightness": float(luma.mean()),
        "saturation": float(((most - least) / np.maximum(most, 1e-6)).mean()),
        "dark": float((luma < DARK).mean()),
        "bright": float((luma > BRIGHT).mean()),
        "sharpness": float((around - 4 * middle).std()),
    }


def entropy(picture: np.ndarray) -> float:
    """Entropy in bits of a picture's colours, uint8 [H, W, 3], at LEVELS levels a channel."""
    levels = picture.astype(np.int64) * LEVELS // 256
    counts = np.bincount((levels @ (LEVELS**2, LEVELS, 1)).ravel())
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum() + 0.0)


def diversity(pictures: np.ndarray, ids: np.ndarray) -> float:
    """Return the mean distance between pictures of the same prompt: root mean square over pixels
    and channels, 0 to 1, first averaged over a prompt's pairs; NaN when no prompt has two.

    Args:
      pictures: uint8 [n, H, W, 3]; ids: i32 [n], each one's prompt.
    """
    reduced = [_reduced(picture).astype(np.float32) / 255 for picture in pictures]
    return within_prompts(reduced, ids, lambda a, b: np.sqrt(np.mean((a - b) ** 2)))


def within_prompts(
    items: Sequence[np.ndarray], ids: np.ndarray, distance: Callable[[Any, Any], Any]
) -> float:
    """Return the mean distance between items of the same prompt, first averaged over a prompt's
    pairs; NaN when no prompt has two.

    Args:
      items: n arrays; ids: i32 [n], each one's prompt.
    """
    means = []
    for i in np.unique(ids):
        own = [item for item, prompt in zip(items, ids) if prompt == i]
        pairs = [distance(a, b) for a, b in itertools.combinations(own, 2)]
        means += [np.mean(pairs)] if pairs else []
    return float(np.mean(means)) if means else float("nan")
