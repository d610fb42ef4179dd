"""Mask2Former with a Swin-S backbone on COCO, GenEval's own detector, through transformers.

Needs torch; runs on CUDA where torch finds it.

Sources: Cheng et al. 2022 (arXiv 2112.01527); sizes and the reading of masks as in mmdetection's
`mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`, which GenEval calls. Deviations: the picture is
resized up to a multiple of 32 px instead of padded to one (the same for square pictures), and mask
logits go from the model's grid to the picture's in one step instead of two.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flowgrpo_jax.detection import coco
from flowgrpo_jax.detection.coco import Found

WEIGHTS = "facebook/mask2former-swin-small-coco-instance"
SHORT, LONG, STEP = 800, 1333, 32  # px: sides of the input, and what they are multiples of
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of red, green, blue
BATCH = 8  # pictures at once


def load(path: str | None, floor: float, device: str | None = None) -> coco.Detector:
    """Load the detector.

    Args:
      path: a local directory or a hub id; None for the published Swin-S weights.
      floor: least confidence of an object that is reported, 0 to 1.
      device: a torch device; None is CUDA where present, else the CPU.

    Raises:
      ImportError: torch is missing. FileNotFoundError: the weights are.
      ValueError: the model does not know COCO's 80 classes.
    """
    try:
        import torch
        from transformers import Mask2FormerForUniversalSegmentation
    except ImportError as error:
        raise ImportError(
            "detector 'mask2former' needs torch: `pip install 'flowgrpo_jax[torch]'`, or set"
            " reward.options.geneval.detector=small, which is far weaker"
        ) from error
    try:
        model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(path or WEIGHTS)
    except OSError as error:
        raise FileNotFoundError(
            f"Mask2Former weights {path or WEIGHTS!r} are neither a local directory nor could they"
            f" be downloaded ({error}). Set reward.options.geneval.detector_path to a local copy"
        ) from error
    labels = model.config.num_labels
    if labels != len(coco.CLASSES):
        raise ValueError(f"{path or WEIGHTS} has {labels} classes, it must be COCO's 80 instances")
    return detector(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), floor)


def detector(model: Any, floor: float) -> coco.Detector:
    """The detector around a torch `Mask2FormerForUniversalSegmentation`, where that lies."""
    import torch

    model = model.eval()

    def detect(images: np.ndarray) -> list[list[Found]]:
        found: list[list[Found]] = []
        for start in range(0, len(images), BATCH):
            with torch.inference_mode():
                some = torch.tensor(images[start : start + BATCH], device=model.device)
                out = model(pixel_values=inputs(some))
                found += [
                    instances(classes, masks, (some.shape[1], some.shape[2]), floor)
                    for classes, masks in zip(out.class_queries_logits, out.masks_queries_logits)
                ]
        return found

    return detect


def inputs(images: Any) -> Any:
    """A tensor uint8 [B, H, W, 3] -> what the model reads, f32 [B, 3, h, w]."""
    import torch

    height, width = images.shape[1:3]
    scale = min(SHORT / min(height, width), LONG / max(height, width))
    size = [-(-round(side * scale) // STEP) * STEP for side in (height, width)]
    x = images.permute(0, 3, 1, 2).float() / 255
    x = torch.nn.functional.interpolate(
        x, size=size, mode="bilinear", align_corners=False, antialias=True
    )
    mean, std = (torch.tensor(v, device=x.device).reshape(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def instances(classes: Any, masks: Any, size: tuple[int, int], floor: float) -> list[Found]:
    """The objects of one picture.

    Args:
      classes: class logits [Q, 81] of the queries, the last one "nothing".
      masks: mask logits [Q, h, w].
      size: height and width of the picture in px.
    """
    import torch

    likely = classes.softmax(-1)[:, :-1]
    top, place = likely.flatten().topk(len(classes))  # a query may be several of these
    place = place[top > floor]  # a mask's own sureness, at most 1, is a factor of the confidence
    query, label = place // likely.shape[1], place % likely.shape[1]
    if not len(query):
        return []
    logits = torch.nn.functional.interpolate(
        masks[query][None], size=size, mode="bilinear", align_corners=False
    )[0]
    inside = logits > 0
    area = inside.sum((1, 2))
    sureness = (logits.sigmoid() * inside).sum((1, 2)) / (area + 1e-6)
    scores = likely[query, label] * sureness
    kept = (scores > floor) & (area > 0)
    return [
        Found(coco.CLASSES[cls], score, bounds(mask), mask)
        for cls, score, mask in zip(
            label[kept].tolist(), scores[kept].tolist(), inside[kept].cpu().numpy()
        )
    ]


def bounds(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box around a mask bool [H, W] that is not empty: (x0, y0, x1, y1), ends outside it."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
