"""GenEval's reward with a detector that is told what to see: scores by hand, and failures."""

import numpy as np
import pytest
from told_detector import (
    BELOW,
    BLUE,
    LEFT,
    RED,
    RIGHT,
    ROWS,
    Told,
    cat,
    color_attr,
    counting,
    dog,
    dogs,
    left_dog,
    picture,
    position,
    right_cat,
    run,
    single,
    two,
)

from flowgrpo_jax.detection import coco
from flowgrpo_jax.detection.coco import Found
from flowgrpo_jax.rewards import geneval

# ------------------------------------------------------------------------------------------- scores

# name: (metadata, detections, painted boxes, graded, strict, official), all worked out by hand
CASES = {
    "single": (single(), [dog], [], 1, 1, 1),
    "single, unsure": (single(), dogs(0.3), [], 0, 0, 0),
    "single, just sure enough": (single(), dogs(0.31), [], 1, 1, 1),
    "single, two": (single(), dogs(0.9, 0.4), [], 0, 0, 1),
    "two": (two(), [left_dog, right_cat], [], 1, 1, 1),
    "two, one missing": (two(), [left_dog], [], 1 / 2, 0, 0),
    "counting": (counting(3), dogs(0.95, 0.91, 0.99), [], 1, 1, 1),
    "counting, one unsure": (counting(3), dogs(0.95, 0.9, 0.99), [], 2 / 3, 0, 0),
    "counting, one more": (counting(2), dogs(0.95, 0.91, 0.99), [], 1 / 2, 0, 0),
    "colors": (single(color="red"), [left_dog], [(LEFT, RED)], 1, 1, 1),
    "colors, wrong": (single(color="red"), [left_dog], [(LEFT, BLUE)], 1 / 2, 0, 0),
    "colors, surest is right": (
        single(color="red"),
        [Found("dog", 0.6, RIGHT), Found("dog", 0.7, LEFT)],
        [(LEFT, RED), (RIGHT, BLUE)],
        0,
        0,
        1,
    ),
    "color_attr": (color_attr(), [left_dog, right_cat], [(LEFT, RED), (RIGHT, BLUE)], 1, 1, 1),
    "color_attr, swapped": (
        color_attr(),
        [left_dog, right_cat],
        [(LEFT, BLUE), (RIGHT, RED)],
        1 / 2,
        0,
        0,
    ),
    "color_attr, one wrong": (
        color_attr(),
        [left_dog, right_cat],
        [(LEFT, RED), (RIGHT, RED)],
        3 / 4,
        0,
        0,
    ),
    "position": (position(), [cat, dog], [], 1, 1, 1),
    "position, mirrored": (position("left of"), [cat, dog], [], 2 / 3, 0, 0),
    "position, above": (position("below"), [cat, Found("dog", 0.8, BELOW)], [], 1, 1, 1),
    "nothing": (two(), [], [], 0, 0, 0),
}


def test_each_tag_through_the_rows():
    """All cases as one batch, so that their order counts too."""
    metadata, told, painted, *wanted = zip(*CASES.values())
    images = [picture(n, *boxes) for n, boxes in enumerate(painted)]
    scores, valid = run(Told(*told), images, list(metadata))
    assert valid.all()
    for row, values in zip(ROWS, wanted):
        for name, got, value in zip(CASES, scores[row], values):
            assert got == pytest.approx(value), (name, row)


def test_thresholds_are_options():
    told = Told(dogs(0.25), dogs(0.6, 0.7))
    options = dict(threshold=0.2, counting_threshold=0.5)
    scores, _ = run(told, [picture(0), picture(1)], [single(), counting(2)], **options)
    np.testing.assert_array_equal(scores["geneval"], [1, 1])
    with pytest.raises(ValueError, match="counting_threshold=1"):
        geneval.make(told, "pixels", counting_threshold=1.0)


def test_sixteen_of_a_class_are_looked_at_the_surest():
    """Twenty dogs: the surest sixteen are red, the others blue. And a cat beside them."""
    pack = [Found("dog", 0.5 - n / 100, LEFT if n < 16 else RIGHT) for n in range(20)]
    told = Told([*pack[::-1], Found("cat", 0.31, RIGHT)])
    asked = {"tag": "colors", "include": [{"class": "dog", "count": 16, "color": "red"}]}
    asked["include"].append({"class": "cat", "count": 1})
    scores, _ = run(told, [picture(0, (LEFT, RED), (RIGHT, BLUE))], [asked])
    assert [scores[row][0] for row in ROWS] == [1, 1, 1]


def test_the_switches_reach_the_rule():
    told, wrong = Told([cat, dog], dogs(0.5, 0.5, 0.5)), position("left of")
    images, metadata = [picture(0), picture(1)], [wrong, single()]
    for options, graded in (
        ({}, [2 / 3, 0]),
        ({"position_bug": True}, [3 / 4, 0]),
        ({"clamp_counts": False}, [2 / 3, -1]),
    ):
        scores, _ = run(told, images, metadata, **options)
        np.testing.assert_allclose(scores["geneval"], graded, rtol=1e-6)
        np.testing.assert_array_equal(scores["geneval_strict"], [0, 0])
        np.testing.assert_array_equal(scores["geneval_official"], [0, 1])


def test_a_classifier_sees_masked_crops_of_the_coloured_classes_alone():
    seen = []

    def classify(crops):
        seen.extend(crops)
        return ["red"] * len(crops)

    mask = np.zeros((32, 32), bool)
    mask[2:5, 20:30] = True
    told = Told([Found("dog", 0.8, RIGHT, mask), cat, Found("dog", 0.2, LEFT)])
    asked = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    scores, _ = run(told, [picture(0)], [asked], colors=classify)
    [crop] = seen
    assert crop.cls == "dog" and scores["geneval"][0] == 1
    np.testing.assert_array_equal(crop.mask, mask[0:10, 20:30])


# ----------------------------------------------------------------------------------------- failures


def test_an_image_that_cannot_be_detected_fails_alone(caplog):
    told = Told([dog], RuntimeError("out of memory"), [dog])
    scores, valid = run(told, [picture(n) for n in range(3)], [single()] * 3)
    np.testing.assert_array_equal(valid, [True, False, True])
    np.testing.assert_array_equal(scores["geneval"], [1, 0, 1])
    assert told.calls == [[0, 1, 2], [0], [1], [2]]
    assert "out of memory" in caplog.text and "trying one by one" in caplog.text


def test_a_detector_that_answers_too_little_fails():
    images, metadata = [picture(0), picture(0)], [single()] * 2
    scores, valid = run(lambda images: [[dog]], images, metadata)
    assert valid.all() and (scores["geneval"] == 1).all()  # one by one it answers
    assert not run(lambda images: [], images, metadata)[1].any()


def test_an_image_whose_colours_fail_fails_alone(caplog):
    def classify(crops):
        if crops:
            raise RuntimeError("no such colour")
        return []

    told = Told([dog], [dog])
    images, metadata = [picture(0), picture(1)], [single(color="red"), single()]
    _, valid = run(told, images, metadata, colors=classify)
    np.testing.assert_array_equal(valid, [False, True])
    assert "no such colour" in caplog.text


@pytest.mark.parametrize(
    "record, message",
    [
        ({}, "they need `tag`.*metadata file"),
        ({"tag": "colors"}, "they need `include` with at least one.*metadata file"),
        ({"include": single()["include"]}, "they need `tag`"),
        ({"tag": "colors", "include": []}, "at least one"),
        (single("dragon"), "class must be one of .*'person'"),
        ({"tag": "counting", "include": [{"class": "dog"}]}, "count must be one of"),
        ({"tag": "counting", "include": [{"class": "dog", "count": 0}]}, "count must be one of"),
        ({"tag": "counting", "include": [{"count": 1}]}, "class must be one of"),
        (single(color="mauve"), "color must be one of .*'red'"),
        (single(position=["right of", 0]), "position must be one of .* earlier"),
        (position("inside"), "position must be one of"),
        (single() | {"exclude": [{"class": "unicorn", "count": 1}]}, "class must be one of"),
    ],
)
def test_metadata_that_are_not_geneval_s_are_an_error(record, message):
    told = Told([dog])
    for make in (geneval.graded, geneval.strict, geneval.official):
        with pytest.raises(ValueError, match=message):
            make(detector=told, colors="pixels")(np.stack([picture(0)]), [""], [record])
    assert told.calls == []


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="'rainbow' is unknown: choose clip or pixels"):
        geneval.make(Told(), "rainbow")
    with pytest.raises(ValueError, match="'eagle' is unknown: choose from mask2former, small"):
        geneval.make("eagle", "pixels")


def test_the_default_detector_says_what_it_needs(monkeypatch):
    """Without torch, and without the weights' package."""
    import builtins

    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] in ("torch", "onnxruntime"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"flowgrpo_jax\[torch\].*geneval\.detector=small"):
        coco.load("mask2former", None, 0.3, None)
    with pytest.raises(ImportError, match=r"flowgrpo_jax\[torch\].*geneval\.colors=pixels"):
        geneval.make(Told(), "clip")
    with pytest.raises(ImportError, match=r"flowgrpo_jax\[geneval\]"):
        coco.load("small", None, 0.3, None)
