"""GenEval on photographs that are composed of packaged ones, with the small detector."""

import numpy as np
import pytest
from PIL import Image
from told_detector import ROWS, counting, single

from flowgrpo_jax import rewards
from flowgrpo_jax.detection import yolo
from flowgrpo_jax.scoring import host


@pytest.fixture(scope="module")
def cutouts():
    """Parts of the packaged photos, by name."""
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    try:
        samples = yolo.packaged().parent.parent / "samples"
    except ImportError as error:
        pytest.skip(str(error))
    street = Image.open(samples / "bus.jpg").convert("RGB")
    players = Image.open(samples / "zidane.jpg").convert("RGB")
    return {
        "man": street.crop((30, 380, 235, 920)),
        "woman": street.crop((205, 400, 355, 860)),
        "coach": players.crop((740, 0, 1130, 720)),
        "bus": street.crop((350, 160, 665, 780)),
    }


def compose(cutouts, *parts, tint=(1, 1, 1)):
    """Parts (name, left, top, height in px) on a plain ground, uint8 [512, 512, 3]."""
    canvas = Image.new("RGB", (512, 512), (150, 160, 150))
    for name, left, top, height in parts:
        part = cutouts[name]
        part = part.resize((round(part.width * height / part.height), height))
        part = Image.fromarray((np.asarray(part) * tint).astype(np.uint8))
        canvas.paste(part, (left, top))
    return np.asarray(canvas)


def test_composed_scenes_end_to_end(cutouts):
    """Real pixels through the small detector, pixel colours and all three rows, in a composite."""
    person = {"class": "person", "count": 1}
    beside = {"class": "person", "count": 1, "position": ["right of", 0]}
    near = {"tag": "position", "include": [{"class": "bus", "count": 1}, beside]}
    three = counting(3) | {"include": [{"class": "person", "count": 3}]}
    three["exclude"] = [{"class": "person", "count": 4}]
    green = {"tag": "colors", "include": [person | {"color": "green"}]}
    man_right = compose(cutouts, ("bus", 40, 240, 200), ("man", 350, 200, 280))
    man_left = compose(cutouts, ("man", 20, 200, 280), ("bus", 380, 240, 200))
    one = compose(cutouts, ("man", 150, 60, 400))
    trio = compose(
        cutouts, ("man", 20, 100, 350), ("woman", 190, 100, 350), ("coach", 330, 150, 300)
    )
    painted = compose(cutouts, ("man", 150, 60, 400), tint=(0.25, 1, 0.25))
    cases = [  # metadata, picture, graded, strict
        (near, man_right, 1, 1),
        (near, man_left, 2 / 3, 0),
        (near, one, 1 / 3, 0),  # no bus: its count 0, the person's 1, the relation 0
        (three, trio, 1, 1),
        (three, one, 1 / 3, 0),
        (green, painted, 1, 1),
        (green, one, 1 / 2, 0),
        (single("person"), compose(cutouts), 0, 0),
    ]
    metadata, images, graded, strict = zip(*cases)
    options = {"detector": "small", "colors": "pixels", "counting_threshold": 0.5}
    loaded = rewards.load(ROWS, {row: options for row in ROWS})
    score = host.composite(loaded, lambda ids: [{**metadata[i], "prompt": ""} for i in ids])
    result = score(np.stack(images), np.arange(len(cases)))
    np.testing.assert_allclose(result["geneval"], graded, rtol=1e-6)
    np.testing.assert_array_equal(result["geneval_strict"], strict)
    np.testing.assert_array_equal(result["geneval_official"], strict)
