"""Draw a scene of flat coloured shapes on a light canvas.

Coordinates are pixels, x to the right and y down; the centre of the top-left pixel
is (0.5, 0.5). Every shape lies inside the disc of its radius around its centre, so a
distance test on discs is enough to keep shapes apart and inside the image.
"""

from typing import NamedTuple

import numpy as np

BACKGROUND = (242, 242, 238)

# Far apart from one another and from the background: every distance in RGB exceeds 110.
PALETTE = {
    "red": (205, 15, 30),
    "orange": (250, 120, 10),
    "yellow": (245, 228, 40),
    "green": (25, 155, 60),
    "blue": (25, 75, 225),
    "purple": (125, 20, 160),
    "pink": (255, 115, 195),
    "black": (20, 20, 20),
}
COLORS = tuple(PALETTE)


class Thing(NamedTuple):
    """One object: its shape and colour names, centre (px) and radius (px)."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


Scene = tuple[Thing, ...]


def _circle(x, y):
    return np.hypot(x, y) - 1.0


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - np.sqrt(0.5)


def _diamond(x, y):
    return (np.abs(x) + np.abs(y) - 1.0) * np.sqrt(0.5)


def _triangle(x, y):
    return np.maximum(y, np.sqrt(0.75) * np.abs(x) - 0.5 * y) - 0.5


def _cross(x, y):
    long, thick = 0.95, 0.31  # the arms' corners touch the unit circle
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - thick, np.maximum(x, y) - long)


def _star(x, y):
    # Fold the plane onto half a point, bounded by the line from the tip (1, 0)
    # to the notch at angle pi/5.
    notch = 0.42
    angle = np.arctan2(x, -y)
    angle = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    r = np.hypot(x, y)
    tip_to_notch = notch * np.exp(1j * np.pi / 5) - 1.0
    nx, ny = tip_to_notch.imag / abs(tip_to_notch), -tip_to_notch.real / abs(tip_to_notch)
    return (r * np.cos(angle) - 1.0) * nx + r * np.sin(angle) * ny


# Each maps offsets from the centre, in radii, to a distance from the outline in radii
# (negative inside; exact along the edges, which is where antialiasing looks).
OUTLINES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "star": _star,
}
SHAPES = tuple(OUTLINES)


def coverage(thing: Thing, size: int) -> tuple[slice, slice, np.ndarray]:
    """The rows and columns that `thing` touches and the share [rows, cols] of each pixel
    it covers (0..1, antialiased over one pixel)."""
    reach = thing.radius + 1.0
    x0, x1 = max(int(thing.x - reach), 0), min(int(thing.x + reach) + 1, size)
    y0, y1 = max(int(thing.y - reach), 0), min(int(thing.y + reach) + 1, size)
    x = (np.arange(x0, x1)[None, :] + (0.5 - thing.x)) / thing.radius
    y = (np.arange(y0, y1)[:, None] + (0.5 - thing.y)) / thing.radius
    distance = OUTLINES[thing.shape](x, y) * thing.radius
    return slice(y0, y1), slice(x0, x1), np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """The picture of `scene`, uint8 RGB [size, size, 3]. Later things cover earlier ones."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUND
    for thing in scene:
        rows, cols, share = coverage(thing, size)
        patch = image[rows, cols]
        patch += share[..., None] * (np.asarray(PALETTE[thing.color], np.float32) - patch)
    return (image + 0.5).astype(np.uint8)
