"""GenEval on pictures of real things: a detector, a colour classifier, and the rule of `geneval`.

The rows `geneval` (graded, for training), `geneval_strict` and `geneval_official` are made by
`graded`, `strict` and `official`, with the options of `make`. Rows of equal options share one
detector, and look at a batch once between them; in a recipe all take those of `geneval`.

Sources: djghosh13/geneval `evaluate_images.py` and yifan123/reward-server `gen_eval.py` for the
thresholds, the cap of 16 and what is classified. Deviations beside those of `geneval`:

1. Pictures are scored as they are, not from JPEGs of quality 75.
2. The detector sees red, green and blue in their places. The reward server hands RGB arrays to
   mmdetection, which takes an array for BGR; the benchmark itself reads files and does not.
3. Official, strict and graded scores come from one look, each colour classified once.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flowgrpo_jax.detection import coco, rule
from flowgrpo_jax.detection.coco import Detector, Found
from flowgrpo_jax.detection.colors import COLORS, Classifier, by_pixels, crop
from flowgrpo_jax.detection.rule import Detection, Score
from flowgrpo_jax.rewards.batch_cache import BatchCache
from flowgrpo_jax.types import Metadata, Reward

log = logging.getLogger(__name__)

MOST = 16  # objects of a class that are looked at, the surest
COUNTS = range(1, MOST + 2)  # that a clause may name; `exclude` names one more than is asked for
ROWS: dict[str, Callable[[Score], float]] = {
    "geneval": lambda score: score.graded,
    "geneval_strict": lambda score: float(score.strict),
    "geneval_official": lambda score: float(score.correct),
}


def make(
    detector: str | Detector = "mask2former",
    colors: str | Classifier | None = None,
    *,
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
    detector_path: str | None = None,
    clip_path: str | None = None,
    device: str | None = None,
    position_bug: bool = False,
    clamp_counts: bool = True,
) -> dict[str, Reward]:
    """The three rows over one detector; equal options, given or left out, share it.

    Args:
      detector: "mask2former" (needs torch), "small" (needs the extra `geneval`), or a detector.
      colors: "clip" (needs torch), "pixels", or a classifier; None is "pixels" for the small
        detector, which is there for when there is no torch, and else "clip".
      threshold, counting_threshold: confidence that an object must exceed, the second for
        pictures of tag "counting". GenEval's values, which are Mask2Former's; the small
        detector is less sure of what it sees.
      detector_path, clip_path: where their weights are, if not the usual ones.
      device: a torch device; None is CUDA where present, else the CPU.
      position_bug: pay for a wrong relation, as upstream does, to compare with it.
      clamp_counts: no negative rewards for far too many objects; upstream has them.

    Raises:
      ValueError: an unknown name, or a threshold that is none.
      ImportError, FileNotFoundError: a package or weights are missing; says what to install.
    """
    for name, value in (("threshold", threshold), ("counting_threshold", counting_threshold)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value}: a confidence to exceed, so from 0 to less than 1")
    if colors is None:
        colors = "pixels" if detector == "small" else "clip"
    shared = judge(
        detector,  # type: ignore[arg-type]  # a callable: it can be hashed
        colors,
        threshold,
        counting_threshold,
        detector_path,
        clip_path,
        device,
        position_bug,
        clamp_counts,
    )
    return {name: _row(shared, pick) for name, pick in ROWS.items()}


@functools.cache
def judge(
    detector: str | Detector,
    colors: str | Classifier,
    threshold: float,
    counting_threshold: float,
    detector_path: str | None,
    clip_path: str | None,
    device: str | None,
    position_bug: bool,
    clamp_counts: bool,
) -> Judge:
    """Return the judge for these options; calls with equal options return the same judge."""
    if isinstance(detector, str):
        floor = min(threshold, counting_threshold)
        detector = coco.load(detector, detector_path, floor, device)
    if isinstance(colors, str):
        colors = _classifier(colors, clip_path, device)
    return Judge(
        detector,
        colors,
        lambda tag: counting_threshold if tag == "counting" else threshold,
        functools.partial(
            rule.score, clamp_counts=clamp_counts, upstream_position_bug=position_bug
        ),
    )


def graded(**options: Any) -> Reward:
    """The row `geneval`: GenEval's graded score, 0 to 1 (below 0 without `clamp_counts`)."""
    return make(**options)["geneval"]


def strict(**options: Any) -> Reward:
    """The row `geneval_strict`: 1 where every clause holds exactly."""
    return make(**options)["geneval_strict"]


def official(**options: Any) -> Reward:
    """The row `geneval_official`: the benchmark's own verdict, which forgives surplus objects."""
    return make(**options)["geneval_official"]


def _classifier(name: str, clip_path: str | None, device: str | None) -> Classifier:
    if name == "pixels":
        return by_pixels
    if name != "clip":
        raise ValueError(
            f"colors={name!r} is unknown: choose clip or pixels, or hand in a function"
        )
    from flowgrpo_jax.detection import clip_colors

    return clip_colors.load(clip_path, device)


def _row(judge: Judge, pick: Callable[[Score], float]) -> Reward:
    def reward(
        images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        results = judge(images, metadata)
        scores = [0.0 if result is None else pick(result) for result in results]
        return np.asarray(scores, np.float32), np.array([r is not None for r in results], bool)

    reward.check = check  # type: ignore[attr-defined]  # of every prompt, before training
    return reward


class Judge:
    """Scores of a batch, kept for the rows that ask for the same batch after it.

    One thread at a time looks: a detector need not be safe for several.
    """

    def __init__(
        self,
        detect: Detector,
        classify: Classifier,
        threshold: Callable[[str], float],
        rule: Callable[[Sequence[Detection], dict], Score],
    ) -> None:
        self.detect, self.classify = detect, classify
        self.threshold, self.rule = threshold, rule
        self.kept: BatchCache[list[Score | None]] = BatchCache()

    def __call__(self, images: np.ndarray, metadata: Sequence[Metadata]) -> list[Score | None]:
        """uint8 [B, H, W, 3], B records -> B scores, None where detection failed.

        Raises ValueError for records that GenEval cannot read.
        """
        for record in metadata:
            check(record)
        asked = [[m["tag"], m["include"], m.get("exclude")] for m in metadata]

        def look() -> list[Score | None]:
            found = self._detect(images)
            return [self._score(*x) for x in zip(images, found, metadata)]

        return self.kept(images, json.dumps(asked, sort_keys=True), look)

    def _detect(self, images: np.ndarray) -> list[Sequence[Found] | None]:
        """Return the objects found in each picture, or None where the detector failed."""
        try:
            found = self.detect(images)
            if len(found) != len(images):
                raise ValueError(
                    f"the detector answered {len(found)} times to {len(images)} images: it must"
                    " return a list of coco.Found for each"
                )
            return list(found)
        except Exception:
            if len(images) == 1:
                log.warning("the detector failed on an image; it gets weight 0", exc_info=True)
                return [None]
            log.warning("the detector failed on %d images; trying one by one", len(images))
            return [self._detect(image[None])[0] for image in images]

    def _score(
        self, image: np.ndarray, found: Sequence[Found] | None, record: Metadata
    ) -> Score | None:
        if found is None:
            return None
        sure = coco.confident(found, self.threshold(record["tag"]), MOST)
        colored = {clause["class"] for clause in record["include"] if "color" in clause}
        looked_at = [thing for thing in sure if thing.cls in colored]
        try:
            names = self.classify([crop(image, thing) for thing in looked_at])
            seen = [Detection(*t[:3], name) for t, name in zip(looked_at, names, strict=True)]
        except Exception:
            log.warning("the colours of an image failed; it gets weight 0", exc_info=True)
            return None
        seen += [Detection(*t[:3]) for t in sure if t.cls not in colored]
        return self.rule(seen, record)


def check(record: Metadata) -> None:
    """Raise ValueError, naming the value, for metadata that are not GenEval's."""
    if "tag" not in record:
        raise ValueError(
            f"metadata {record!r} are not GenEval's: they need `tag`. Take prompts from a GenEval"
            " metadata file (.jsonl)"
        )
    rule.check(record, classes=coco.CLASSES, counts=COUNTS, colors=COLORS)
