"""Detectors: their classes and confidences, and what the small one sees against OpenCV's reader."""

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.detection import coco, yolo
from flowgrpo_jax.detection.coco import Found


def test_the_classes_are_coco_s_in_order():
    """Contiguous ids of COCO, by hand: every detector's label 16 is a dog."""
    assert len(set(coco.CLASSES)) == 80
    by_id = {0: "person", 3: "motorcycle", 9: "traffic light", 16: "dog", 43: "knife", 49: "orange"}
    by_id |= {57: "couch", 64: "computer mouse", 65: "tv remote", 66: "computer keyboard"}
    by_id |= {62: "tv", 67: "cell phone", 78: "hair drier", 79: "toothbrush"}
    assert {i: coco.CLASSES[i] for i in by_id} == by_id


def weights():
    """The packaged weights' folder; skips without it."""
    try:
        return yolo.packaged()
    except ImportError as error:
        pytest.skip(str(error))


def test_the_classes_are_those_of_the_packaged_detector():
    theirs = {"motorbike", "aeroplane", "sofa", "pottedplant", "diningtable", "tvmonitor"}
    theirs |= {"mouse", "remote", "keyboard"}
    names = (weights() / "coco.names").read_text().split("\n")[:80]
    assert {name for name, ours in zip(names, coco.CLASSES) if name != ours} == theirs


def test_an_unknown_detector_is_an_error_that_lists_the_others():
    with pytest.raises(ValueError, match="'yolo9000' is unknown: choose from mask2former, small"):
        coco.load("yolo9000", None, 0.3, None)


def test_confident_cuts_sorts_and_caps_each_class():
    box = (0, 0, 1, 1)
    dogs = [Found("dog", s, box) for s in (0.5, 0.9, 0.3, 0.7)]
    cats = [Found("cat", s, box) for s in (0.31, 0.8)]
    kept = coco.confident([*dogs, *cats], threshold=0.3, most=2)
    assert [(f.cls, f.score) for f in kept] == [
        ("dog", 0.9),
        ("cat", 0.8),
        ("dog", 0.7),
        ("cat", 0.31),
    ]


# ------------------------------------------------------------------------------- the small detector


def small(floor):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    samples = weights().parent.parent / "samples"
    return coco.load("small", None, floor, None), samples


# What OpenCV 4.14's own Darknet reader and class-wise suppression say of the package's photos,
# at confidence 0.25, overlap 0.45 and the same resizing.
OPENCV = {
    "bus.jpg": [
        ("person", 0.9905, (52.2, 392.5, 221.3, 908.6)),
        ("person", 0.8985, (673.2, 379.6, 809.4, 874.9)),
        ("person", 0.8894, (214.1, 408.6, 349.9, 846.8)),
        ("bus", 0.7428, (0, 170.1, 706.6, 779.7)),
    ],
    "zidane.jpg": [
        ("person", 0.7915, (749.1, 11.2, 1118.4, 704.9)),
        ("tie", 0.4670, (980.3, 309.0, 1038.8, 420.2)),
    ],
}


@pytest.mark.parametrize("name", OPENCV)
def test_the_small_detector_sees_what_opencv_does(name):
    detect, photos = small(0.25)
    [found] = detect(np.asarray(Image.open(photos / name).convert("RGB"))[None])
    for ours, (cls, score, box) in zip(
        sorted(found, key=lambda f: -f.score), OPENCV[name], strict=True
    ):
        assert ours.cls == cls and ours.score == pytest.approx(score, abs=2e-3)
        np.testing.assert_allclose(ours.box, box, atol=1)


def test_a_folder_without_weights_is_an_error(tmp_path):
    small(0.5)
    with pytest.raises(FileNotFoundError, match=r"must hold one \.cfg file, it has 0"):
        coco.load("small", str(tmp_path), 0.5, None)
