"""The colour of a detected object: what is looked at, and a classifier without a network.

A classifier is any callable `(crops) -> colour names`. `clip_colors` holds GenEval's own;
`by_pixels` here is an approximation of it for when there is no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flowgrpo_jax.detection.coco import Found

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
BACKGROUND = 0x99  # of each channel: the grey that GenEval puts around a masked object

# What `by_pixels` compares with, sRGB in hex, each colour in a few shades.
SHADES = {
    "red": "e01b1b a01414 ff3b30",
    "orange": "ff8c00 e8701a ffa040",
    "yellow": "ffe11a e6c619 fff06b",
    "green": "2e9e3a 14591e 8ad65c 6b7f2a",
    "blue": "1f4fd0 14246b 5aa7e8 9cc8f0 1fa0b4",
    "purple": "7a2fa0 48145e a884dc",
    "pink": "ff8fc0 f7b8cc e8469c",
    "brown": "7a4a20 4d2c12 a06c3c",
    "black": "0c0c0c 2b2b2b 454545",
    "white": "ffffff e6e6e6 c8c8c8",
}
_XYZ = (  # linear sRGB to CIE XYZ (IEC 61966-2-1)
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
CENTRE = 0.5  # share of a box's width and height, around its centre, that stands for a mask


class Crop(NamedTuple):
    """An object cut out by its box: pixels uint8 [h, w, 3], which of them it covers, bool [h, w]
    or None, and its class name."""

    image: np.ndarray
    mask: np.ndarray | None
    cls: str


Classifier = Callable[[Sequence[Crop]], Sequence[str]]


def crop(image: np.ndarray, found: Found) -> Crop:
    """An object of a picture uint8 [H, W, 3], at least one pixel of it."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = found.box
    left, top = (int(np.clip(np.floor(v), 0, n - 1)) for v, n in ((x0, width), (y0, height)))
    right, bottom = (
        int(np.clip(np.ceil(v), start + 1, n))
        for v, start, n in ((x1, left, width), (y1, top, height))
    )
    inside = slice(top, bottom), slice(left, right)
    return Crop(image[inside], None if found.mask is None else found.mask[inside], found.cls)


def on_grey(crop: Crop) -> np.ndarray:
    """The crop with grey where the object is not, uint8 [h, w, 3]; without a mask, as it is."""
    if crop.mask is None:
        return crop.image
    return np.where(crop.mask[..., None], crop.image, np.uint8(BACKGROUND))


def by_pixels(crops: Sequence[Crop]) -> list[str]:
    """Each crop's colour by a vote of its pixels, each for the nearest shade in CIELAB.

    An approximation: it knows no lighting and no materials. Pixels outside the mask have no vote;
    without a mask the middle of the box votes.
    """
    return [COLORS[int(np.argmax(_votes(_pixels(crop))))] for crop in crops]


def _pixels(crop: Crop) -> np.ndarray:
    """The object's pixels, uint8 [N, 3]."""
    if crop.mask is not None and crop.mask.any():
        return crop.image[crop.mask]
    margins = [int(n * (1 - CENTRE) / 2) for n in crop.image.shape[:2]]
    inner = tuple(slice(m, n - m) for m, n in zip(margins, crop.image.shape))
    return crop.image[inner].reshape(-1, 3)


def _votes(pixels: np.ndarray) -> np.ndarray:
    """Pixels for each colour, int [10]."""
    shades = [(i, shade) for i, c in enumerate(COLORS) for shade in SHADES[c].split()]
    owner = np.array([i for i, _ in shades])
    points = lab(np.array([list(bytes.fromhex(shade)) for _, shade in shades]))
    distance = np.square(lab(pixels)[:, None] - points).sum(-1)
    return np.bincount(owner[distance.argmin(1)], minlength=len(COLORS))


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0 to 255, [..., 3], as CIELAB of white point D65 (L 0 to 100)."""
    x = np.asarray(rgb, np.float64) / 255
    x = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    to_xyz = np.array(_XYZ)
    xyz = x @ to_xyz.T / to_xyz.sum(1)  # white is (1, 1, 1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    fx, fy, fz = np.moveaxis(f, -1, 0)
    return np.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], -1)
