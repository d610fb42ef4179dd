"""The rows of GenEval: they share one detector, and look at a batch once."""

import threading
import time

import numpy as np
import pytest
from told_detector import LEFT, RED, ROWS, Told, cat, dog, left_dog, picture, run, single, two

from flowgrpo_jax import rewards
from flowgrpo_jax.configs import geneval as recipe
from flowgrpo_jax.detection import clip_colors, coco
from flowgrpo_jax.rewards import geneval


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
