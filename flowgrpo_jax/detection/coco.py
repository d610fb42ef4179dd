"""Detectors of COCO's 80 classes: their interface and the table of their names.

A detector is any callable that obeys `Detector`. To add one: a file of this folder with a function
`load(path, floor, device)`, a row in `DETECTORS`, a test.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

# In the order of every detector's contiguous ids, by GenEval's names: "computer mouse",
# "tv remote" and "computer keyboard" where COCO says mouse, remote and keyboard.
_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
    toothbrush
"""
CLASSES = tuple(" ".join(_NAMES.split()).split(", "))

DETECTORS = {
    "mask2former": "flowgrpo_jax.detection.mask2former:load",
    "small": "flowgrpo_jax.detection.yolo:load",
}


class Found(NamedTuple):
    """One object in a picture: class name, confidence 0 to 1, box (x0, y0, x1, y1) in px with y
    down, and which pixels it covers, bool [H, W], where the detector says."""

    cls: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector(Protocol):
    """Finds objects in pictures."""

    def __call__(self, images: np.ndarray) -> Sequence[Sequence[Found]]:
        """uint8 [B, H, W, 3] -> the objects in each picture, in any order."""
        ...


def load(name: str, path: str | None, floor: float, device: str | None) -> Detector:
    """Load a detector by its name.

    Args:
      path: where its weights are; None for its usual ones.
      floor: objects below this confidence need not be reported.
      device: what torch calls it, for detectors that use torch; None picks CUDA where present.

    Raises:
      ValueError: no such name. ImportError, FileNotFoundError: see the detector's own `load`.
    """
    if name not in DETECTORS:
        raise ValueError(f"detector {name!r} is unknown: choose from {', '.join(DETECTORS)}")
    module, _, function = DETECTORS[name].partition(":")
    return getattr(importlib.import_module(module), function)(path, floor, device)


def confident(found: Sequence[Found], threshold: float, most: int) -> list[Found]:
    """The `most` surest objects of each class whose confidence exceeds `threshold`, surest first.

    Source: djghosh13/geneval `evaluate_images.py`. No overlap is removed there either.
    """
    kept: list[Found] = []
    count: dict[str, int] = {}
    for thing in sorted(found, key=lambda f: -f.score):
        if thing.score > threshold and count.get(thing.cls, 0) < most:
            kept.append(thing)
            count[thing.cls] = count.get(thing.cls, 0) + 1
    return kept
