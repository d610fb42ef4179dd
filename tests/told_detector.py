"""GenEval on grey pictures, with a detector that is told what to see in each."""

import numpy as np

from flowgrpo_jax import rewards
from flowgrpo_jax.detection.coco import Found

LEFT, RIGHT, BELOW = (0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30)
RED, BLUE, GREY = (220, 20, 20), (20, 40, 200), (128, 128, 128)
ROWS = ("geneval", "geneval_strict", "geneval_official")


def picture(number, *painted):
    """A grey picture uint8 [32, 32, 3] that says its number in a corner, boxes painted."""
    image = np.full((32, 32, 3), GREY, np.uint8)
    for box, rgb in painted:
        x0, y0, x1, y1 = box
        image[y0:y1, x0:x1] = rgb
    image[31, 31] = number
    return image


class Told:
    """A detector that says of picture n what it was told; an exception is raised."""

    def __init__(self, *told):
        self.told, self.calls = told, []

    def __call__(self, images):
        numbers = [int(image[31, 31, 0]) for image in images]
        self.calls.append(numbers)
        for n in numbers:
            if isinstance(self.told[n], Exception):
                raise self.told[n]
        return [self.told[n] for n in numbers]


def run(detector, images, metadata, **options):
    """{row: scores} and the validity that all rows agree on."""
    options = {"detector": detector, "colors": "pixels"} | options
    loaded = rewards.load(ROWS, {row: options for row in ROWS})
    asked = [""] * len(images), metadata
    results = {row: loaded[row](np.stack(images), *asked) for row in ROWS}
    valid = results["geneval"][1]
    for scores, also in results.values():
        assert scores.dtype == np.float32 and scores.shape == also.shape == (len(images),)
        np.testing.assert_array_equal(also, valid)
    return {row: results[row][0] for row in ROWS}, valid


def dogs(*scores):
    return [Found("dog", s, LEFT) for s in scores]


def counting(n):
    return {
        "tag": "counting",
        "include": [{"class": "dog", "count": n}],
        "exclude": [{"class": "dog", "count": n + 1}],
    }


def single(cls="dog", **clause):
    return {"tag": "single_object", "include": [{"class": cls, "count": 1, **clause}]}


def two():
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]
    return {"tag": "two_object", "include": include}


def position(relation="right of"):
    dog = {"class": "dog", "count": 1, "position": [relation, 0]}
    return {"tag": "position", "include": [{"class": "cat", "count": 1}, dog]}


def color_attr():
    include = [
        {"class": "dog", "count": 1, "color": "red"},
        {"class": "cat", "count": 1, "color": "blue"},
    ]
    return {"tag": "color_attr", "include": include}


dog, cat, right_cat = Found("dog", 0.8, RIGHT), Found("cat", 0.8, LEFT), Found("cat", 0.8, RIGHT)
left_dog = Found("dog", 0.8, LEFT)
