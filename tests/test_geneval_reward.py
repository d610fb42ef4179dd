"""GenEval on photographs: with a detector that is told what to see, and on composed pictures."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax import rewards
from flowgrpo_jax.configs import geneval as recipe
from flowgrpo_jax.detection import clip_colors, coco, yolo
from flowgrpo_jax.detection.coco import Found
from flowgrpo_jax.rewards import geneval
from flowgrpo_jax.scoring import host

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


# -------------------------------------------------------------------------- shared between rows


def test_rows_look_at_a_batch_once():
    told = Told([dog], [dog, cat])
    images, metadata = [picture(0), picture(1)], [single(), two()]
    run(told, images, metadata)
    assert told.calls == [[0, 1]]
    run(told, images, [single(), single()])  # other prompts
    run(told, images[::-1], metadata)  # other images
    assert told.calls == [[0, 1], [0, 1], [1, 0]]
    run(told, images, metadata)
    assert len(told.calls) == 3


LOADED = []  # what was loaded, with which arguments


def load_detector(*arguments):
    LOADED.append(("detector", *arguments))
    return Told([left_dog], [left_dog])


@pytest.fixture
def loaded(monkeypatch):
    """Stand-ins for what has weights; the list of what was loaded."""

    def load_colors(*arguments):
        LOADED.append(("colors", *arguments))
        return lambda crops: ["blue"] * len(crops)

    for name in coco.DETECTORS:
        monkeypatch.setitem(coco.DETECTORS, name, f"{__name__}:load_detector")
    monkeypatch.setattr(clip_colors, "load", load_colors)
    LOADED.clear()
    geneval.judge.cache_clear()
    yield LOADED
    geneval.judge.cache_clear()


def test_the_recipe_evaluates_all_rows_with_one_detector(loaded):
    config = recipe.get_config()
    assert set(config.eval.rewards) == set(ROWS)
    rewards.load(config.eval.rewards, config.reward.options.to_dict())
    rewards.load(config.reward.weights, config.reward.options.to_dict())
    assert loaded == [("detector", None, 0.3, None), ("colors", None, None)]
    rewards.load(ROWS)  # defaults that are not written down
    rewards.load(ROWS, {"geneval": {"detector": "mask2former", "colors": "clip"}})
    assert len(loaded) == 2


def test_all_rows_take_the_options_of_the_first(loaded):
    made = rewards.load(ROWS, {"geneval": {"threshold": 0.2, "device": "cuda:3"}})
    assert loaded == [("detector", None, 0.2, "cuda:3"), ("colors", None, "cuda:3")]
    asked = np.stack([picture(0)]), [""], [single(color="blue")]
    assert [made[row](*asked)[0][0] for row in ROWS] == [1, 1, 1]
    rewards.load(["geneval_strict"], {"geneval_strict": {"threshold": 0.1}})
    assert loaded[2:] == [("detector", None, 0.1, None), ("colors", None, None)]


def test_the_small_detector_comes_with_colours_that_need_no_torch(loaded):
    asked = np.stack([picture(0, (LEFT, RED))]), [""], [single(color="red")]
    for colors, graded in ((None, 1), ("pixels", 1), ("clip", 1 / 2)):
        made = rewards.load(["geneval"], {"geneval": {"detector": "small", "colors": colors}})
        assert made["geneval"](*asked)[0][0] == graded
    assert [what for what, *_ in loaded] == ["detector", "detector", "colors"]


def test_few_batches_are_kept():
    told = Told(*[[dog]] * 40)
    for n in range(40):
        run(told, [picture(n)], [single()])
    assert len(told.calls) == 40
    run(told, [picture(39)], [single()])
    assert len(told.calls) == 40
    run(told, [picture(0)], [single()])
    assert len(told.calls) == 41


def test_one_thread_at_a_time_asks_the_detector():
    inside, most = [], []

    def slow(images):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return [[dog] for _ in images]

    graded = geneval.make(slow, "pixels")["geneval"]
    batches = [np.stack([picture(n % 3)]) for n in range(9)]
    results = [None] * 9

    def score(n):
        results[n] = graded(batches[n], [""], [single()])[0][0]

    threads = [threading.Thread(target=score, args=(n,)) for n in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [1] * 9 and most == [1] * 3  # three different batches


# ------------------------------------------------------------------------------------- failures


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


# ------------------------------------------------------------------- composed pictures, for real


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
