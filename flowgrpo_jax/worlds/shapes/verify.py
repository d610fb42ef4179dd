"""Find the objects in a picture of the shapes world, and judge a picture against a prompt.

Every pixel that is more than half as far from the background as its surroundings' peak is
foreground; what of it hangs together is an object, also over pixels that are far from the
background alone. Its shape is the template that overlaps
it best once both have area 1 and their centroids coincide, its colour the palette entry that
most of its inner pixels are nearest to. What resembles no template well enough, or two equally
well, is "unknown": a fused pair, a smear, a ring. Pure numpy and scipy, about half a
millisecond a picture.
"""

import numpy as np
from scipy import ndimage

from flowgrpo_jax.detection import rule
from flowgrpo_jax.detection.rule import Detection, Score
from flowgrpo_jax.worlds.shapes.render import BACKGROUND, COLORS, OUTLINES, PALETTE, SHAPES

UNKNOWN = "unknown"
MIN_AREA = 20  # px; smaller specks are ignored (the smallest star the grammar draws has 79)
MAX_SHARE = 0.25  # of the picture; larger things are unknown, or a black picture were a square
MIN_CONTRAST = 55.0  # RGB distance from the background that is never foreground (pink has 135)
# RGB distance from the background above which pixels hang together whatever is around them: beside
# black (384) pink is less than half of the peak, and a fused pair with it were two shapes.
JOINS = 90.0
# How far an autoencoder may wear a shape, as the Gaussian blur (in radii) of its most worn
# template: thin shapes lose notches and corners first. A cross worn further is a diamond.
WEAR = {
    "circle": 0.1,
    "square": 0.2,
    "triangle": 0.13,
    "diamond": 0.13,
    "cross": 0.17,
    "star": 0.2,
}
STAGES = (0.0, 0.65, 1.0)  # of the wear, a template each
# IoU with the best template below which a shape is unknown. Compact shapes overlap everything:
# with a circle, a hexagon has 0.93 and a real circle after heavy blur 0.94 or more.
MIN_IOU = {
    "circle": 0.92,
    "square": 0.88,
    "triangle": 0.85,
    "diamond": 0.88,
    "cross": 0.86,
    "star": 0.82,
}
MIN_LEAD = 0.01  # of the best IoU over the second best
FINE = 3  # samples a pixel to measure an object with
COLOR_TOLERANCE = 90.0  # RGB distance of a pixel to its palette entry
COLOR_SHARE = 0.55  # of an object's inner pixels that must agree on its colour

_BACKGROUND = np.array(BACKGROUND, np.float32)
_PALETTE = np.array([PALETTE[name] for name in COLORS], np.float32)
_CELLS = 64
_CELL = 2 / _CELLS  # in square roots of the object's area; no shape is wider than the grid
_GRID = (np.arange(_CELLS) - (_CELLS - 1) / 2) * _CELL


def _template(outline, blur: float) -> np.ndarray:
    """The inside of an outline after a Gaussian blur (in radii), scaled to area 1 and its
    centroid at 0, on the grid [cells * cells]."""
    step = 0.008
    at = np.arange(-1.8, 1.8, step)  # as far as the grid of the largest shape, the circle
    filled = (outline(at[None, :], at[:, None]) < 0).astype(np.float32)
    inside = ndimage.gaussian_filter(filled, blur / step) > 0.5
    side = np.sqrt(inside.sum())
    rows, cols = (np.rint(i.mean() + side * _GRID).astype(int) for i in np.nonzero(inside))
    return inside[np.ix_(rows, cols)].astype(np.float32).ravel()


_TEMPLATES = np.stack([_template(OUTLINES[s], stage * WEAR[s]) for stage in STAGES for s in SHAPES])


def judge(image: np.ndarray, metadata: dict) -> Score:
    """Score one picture, uint8 RGB [H, W, 3], in a closed world: clutter is an error."""
    return rule.score(detect(image), metadata, closed_world=True)


def detect(image: np.ndarray) -> list[Detection]:
    """Find the objects in a uint8 RGB picture [H, W, 3]; unclear shapes are called "unknown".

    The score is the IoU with the best template, the box in px with exclusive ends, the colour
    None where it is unclear. Components under MIN_AREA px are ignored.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 picture [H, W, 3], got {image.dtype} {image.shape}")
    pixels = image.astype(np.float32)
    contrast = np.sqrt(((pixels - _BACKGROUND) ** 2).sum(-1))
    # 1 inside an object, 0 on the background, 1/2 on the outline, whatever the colour. The
    # reach of 2 px is less than the gap between objects, so a dark one cannot hide a light one.
    level = contrast / np.maximum(_peak(contrast, 2), 2 * MIN_CONTRAST)
    labels, count = ndimage.label((level > 0.5) | (contrast > JOINS))
    labels[level <= 0.5] = 0
    if count == 0:
        return []
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    colors = _colors(pixels, labels, count)
    detections = []
    for k, place in enumerate(ndimage.find_objects(labels), start=1):
        if place and areas[k] >= MIN_AREA:
            rows, cols = place
            cls, iou = _shape(level, labels, k, rows, cols)
            if areas[k] > MAX_SHARE * labels.size:
                cls = UNKNOWN
            box = (float(cols.start), float(rows.start), float(cols.stop), float(rows.stop))
            detections.append(Detection(cls, iou, box, colors[k]))
    return detections


def _peak(values: np.ndarray, reach: int) -> np.ndarray:
    """Largest value within `reach` rows and columns of each pixel."""
    for axis in (0, 1):
        lines = np.swapaxes(values, 0, axis)
        best = lines.copy()
        for step in range(1, reach + 1):
            np.maximum(best[step:], lines[:-step], out=best[step:])
            np.maximum(best[:-step], lines[step:], out=best[:-step])
        values = np.swapaxes(best, 0, axis)
    return values


def _colors(pixels, labels, count) -> list[str | None]:
    """The colour of each label 0..count, by vote of its pixels off the outline, whose own
    colour is mixed with the background's."""
    inner = labels > 0
    inner[1:] &= labels[:-1] > 0
    inner[:-1] &= labels[1:] > 0
    inner[:, 1:] &= labels[:, :-1] > 0
    inner[:, :-1] &= labels[:, 1:] > 0
    colors, owner = pixels[inner], labels[inner]
    distance = ((colors[:, None] - _PALETTE) ** 2).sum(-1)
    known = distance.min(1) < COLOR_TOLERANCE**2
    ballot = np.where(known, distance.argmin(1), len(COLORS))
    width = len(COLORS) + 1
    votes = np.bincount(owner * width + ballot, minlength=(count + 1) * width)
    votes = votes.reshape(count + 1, width)
    clear = votes[:, :-1].max(1) >= COLOR_SHARE * np.maximum(votes.sum(1), 1)
    return [COLORS[v.argmax()] if ok else None for v, ok in zip(votes, clear, strict=True)]


def _shape(level, labels, k, rows, cols) -> tuple[str, float]:
    """Class and template IoU of component `k` within its box."""
    rows = slice(max(rows.start - 1, 0), rows.stop + 1)  # a rim, to interpolate the outline
    cols = slice(max(cols.start - 1, 0), cols.stop + 1)
    label = labels[rows, cols]
    own = np.where((label == k) | (label == 0), level[rows, cols], 0)
    # Where and how large it is, to a fraction of a pixel.
    y, x = (np.arange(0, n - 0.99, 1 / FINE) for n in own.shape)
    fine = _inside(own, y, x)
    area = fine.sum()
    y, x = fine.sum(1) @ y / area, fine.sum(0) @ x / area
    side = np.sqrt(area) / FINE

    inside = _inside(own, y + side * _GRID, x + side * _GRID)
    overlap = _TEMPLATES @ inside.ravel() * _CELL**2
    # Both areas are 1, also where the object leaves the grid.
    iou = np.minimum(overlap / (2 - overlap), 1).reshape(len(STAGES), -1).max(0)
    best = iou.argmax()
    second = np.partition(iou, -2)[-2]
    clear = iou[best] >= MIN_IOU[SHAPES[best]] and iou[best] - second >= MIN_LEAD
    return SHAPES[best] if clear else UNKNOWN, float(iou[best])


def _inside(level, y, x) -> np.ndarray:
    """Return 1.0 for samples [len(y), len(x)] inside the contour at 1/2 of `level`, else 0.0.

    `level` is interpolated linearly between pixels.
    """
    samples = _hat(y, level.shape[0]) @ level @ _hat(x, level.shape[1]).T
    return (samples > 0.5).astype(np.float32)


def _hat(at, length) -> np.ndarray:
    """Weights [len(at), length] that interpolate a row of `length` samples linearly, 0 beyond."""
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(length)))
