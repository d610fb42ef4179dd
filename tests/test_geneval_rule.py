"""The GenEval rule on hand-written detections; every expected score is worked out by hand."""

import pytest

from flowgrpo_jax.detection.rule import Detection, relations, score

# Boxes of 10 x 10 px in a row (A, B, C from left to right) and one under A.
A, B, C, UNDER = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10), (0, 20, 10, 30)


def thing(cls, box=A, color=None, confidence=0.9):
    return Detection(cls, confidence, box, color)


def single():
    return {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}


def two():
    return {
        "tag": "two_object",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}],
    }


def counting(n):
    return {
        "tag": "counting",
        "include": [{"class": "dog", "count": n}],
        "exclude": [{"class": "dog", "count": n + 1}],
    }


def colored():
    return {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}


def position():
    """a dog right of a cat"""
    dog = {"class": "dog", "count": 1, "position": ["right of", 0]}
    return {"tag": "position", "include": [{"class": "cat", "count": 1}, dog]}


def color_attr():
    dog = {"class": "dog", "count": 1, "color": "red"}
    return {"tag": "color_attr", "include": [dog, {"class": "cat", "count": 1, "color": "blue"}]}


def dogs(n):
    return [thing("dog", (20 * i, 0, 20 * i + 10, 10)) for i in range(n)]


red_dog, blue_dog = thing("dog", A, "red"), thing("dog", A, "blue")
red_cat, blue_cat = thing("cat", B, "red"), thing("cat", B, "blue")

# name: (metadata, detections, graded, strict, correct)
CASES = {
    "single, right": (single(), dogs(1), 1, True, True),
    "single, nothing": (single(), [], 0, False, False),
    "single, two of them": (single(), dogs(2), 0, False, True),
    "single, three of them, clamped": (single(), dogs(3), 0, False, True),
    "single, others do not matter": (single(), [*dogs(1), thing("cow", B)], 1, True, True),
    "two, right": (two(), [thing("dog"), thing("cat", B)], 1, True, True),
    "two, one missing": (two(), [thing("cat", B)], 1 / 2, False, False),
    "two, one twice": (two(), [*dogs(2), thing("cat", C)], 1 / 2, False, True),
    "counting, right": (counting(4), dogs(4), 1, True, True),
    "counting, one less": (counting(4), dogs(3), 3 / 4, False, False),
    "counting, one more is excluded": (counting(4), dogs(5), 3 / 4, False, False),
    "colors, right": (colored(), [red_dog], 1, True, True),
    "colors, wrong colour": (colored(), [blue_dog], 1 / 2, False, False),
    "colors, unclear colour": (colored(), [thing("dog")], 1 / 2, False, False),
    "colors, missing: count and colour both 0": (colored(), [], 0, False, False),
    "colors, best of two is red": (
        colored(),
        [thing("dog", B, "blue", 0.5), red_dog],
        0,
        False,
        True,
    ),
    "colors, best of two is blue": (
        colored(),
        [red_dog, thing("dog", B, "blue", 0.99)],
        0,
        False,
        False,
    ),
    "color_attr, right": (color_attr(), [red_dog, blue_cat], 1, True, True),
    "color_attr, one colour wrong": (color_attr(), [red_dog, red_cat], 3 / 4, False, False),
    "color_attr, swapped": (color_attr(), [blue_dog, red_cat], 1 / 2, False, False),
    "color_attr, cat missing": (color_attr(), [red_dog], 2 / 4, False, False),
    "position, right": (position(), [thing("cat"), thing("dog", B)], 1, True, True),
    "position, mirrored": (position(), [thing("dog"), thing("cat", B)], 2 / 3, False, False),
    "position, across": (position(), [thing("cat"), thing("dog", UNDER)], 2 / 3, False, False),
    "position, dog missing": (position(), [thing("cat")], 1 / 3, False, False),
    "position, cat missing": (position(), [thing("dog", B)], 1 / 3, False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_each_tag(name):
    metadata, detections, graded, strict, correct = CASES[name]
    result = score(detections, metadata)
    assert result == (pytest.approx(graded), strict, correct)


def test_upstream_position_bug_pays_for_a_wrong_relation():
    mirrored = [thing("dog"), thing("cat", B)]
    assert score(mirrored, position(), upstream_position_bug=True).graded == pytest.approx(3 / 4)
    right = [thing("cat"), thing("dog", B)]
    assert score(right, position(), upstream_position_bug=True) == (1, True, True)
    # Without a target upstream appends only the 0: clauses are 0 (cat), 1 (dog), 0 (relation).
    alone = [thing("dog", B)]
    assert score(alone, position(), upstream_position_bug=True).graded == pytest.approx(1 / 3)
    assert not score(mirrored, position(), upstream_position_bug=True).strict


def test_unclamped_counts_go_negative():
    assert score(dogs(4), single(), clamp_counts=False).graded == pytest.approx(-2)


@pytest.mark.parametrize(
    "metadata, detections, graded, strict",
    [
        (single(), dogs(1), 1, True),
        (single(), [*dogs(1), thing("unknown", B)], 1 / 2, False),
        (single(), [*dogs(1), thing("cow", B), thing("unknown", C)], 1 / 3, False),
        (two(), [thing("dog"), thing("cat", B), thing("cow", C)], 2 / 3, False),
        (two(), [thing("dog"), thing("cow", C)], 1 / 2 * 2 / 3, False),
        (counting(4), [*dogs(4), thing("cow", UNDER)], 4 / 5, False),
        (single(), [], 0, False),
        (single(), [thing("cow")], 0, False),
    ],
)
def test_closed_world_punishes_what_was_not_asked_for(metadata, detections, graded, strict):
    result = score(detections, metadata, closed_world=True)
    assert result[:2] == (pytest.approx(graded), strict)
    assert result.correct == score(detections, metadata).correct


def test_relations_drop_a_tenth_of_the_sizes_and_need_half_of_the_offset():
    a = thing("a", (0, 0, 10, 10))
    # Offset (3, 0), slack 0.1 * (10 + 10) = 2, so (1, 0) / 3: not clear.
    assert relations(a, thing("b", (3, 0, 13, 10))) == set()
    # Offset (5, 0): (3, 0) / 5 = 0.6.
    assert relations(a, thing("b", (5, 0, 15, 10))) == {"left of"}
    # Offset (30, 40): (28, 38) / 50 = (0.56, 0.76), both.
    assert relations(a, thing("b", (30, 40, 40, 50))) == {"left of", "above"}
    assert relations(thing("b", (30, 40, 40, 50)), a) == {"right of", "below"}
    # Offset (27, 40): (25, 38) / 48.26 = (0.518, 0.787); (25, 40): 23 / 47.17 = 0.488.
    assert relations(a, thing("b", (27, 40, 37, 50))) == {"left of", "above"}
    assert relations(a, thing("b", (25, 40, 35, 50))) == {"above"}
    assert relations(a, a) == set()


@pytest.mark.parametrize("include", [[], [{"class": "dog", "count": 0}]])
def test_metadata_that_ask_for_nothing_are_an_error(include):
    with pytest.raises(ValueError, match="at least one object"):
        score([], {"tag": "single_object", "include": include})
