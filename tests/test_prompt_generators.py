"""Generated prompts against hand-written ones, counting, and readers of their own.

What a prompt shows is read from its text here, never from its metadata.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from flowgrpo_jax import prompts
from flowgrpo_jax.detection.rule import Detection, score
from flowgrpo_jax.prompts import geneval

ROOT = Path(__file__).parent.parent
RELATION = re.compile(r"a photo of an? (.+) (left of|right of|above|below) an? (.+)")
COLORS = "red orange yellow green blue purple pink brown black white".split()  # noqa: SIM905
NUMBERS = {"two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def pool():
    return prompts.load("geneval:train")


@pytest.fixture(scope="module")
def held():
    return prompts.load("geneval:test")


# ---------------------------------------------------------------------------- GenEval's wording


@pytest.mark.parametrize(
    "record, prompt",
    [
        (geneval.single_object("airplane"), "a photo of an airplane"),
        (geneval.two_object(("umbrella", "tv")), "a photo of an umbrella and a tv"),
        (geneval.counting("bus", 2), "a photo of two buses"),
        (geneval.counting("wine glass", 3), "a photo of three wine glasses"),
        (geneval.counting("knife", 4), "a photo of four knifes"),
        (geneval.counting("skis", 2), "a photo of two skises"),
        (geneval.colors("orange", "cat"), "a photo of an orange cat"),
        (geneval.colors("red", "orange"), "a photo of a red orange"),
        (
            geneval.color_attr(("apple", "hair drier"), ("green", "orange")),
            "a photo of a green apple and an orange hair drier",
        ),
    ],
)
def test_wording(record, prompt):
    assert record["prompt"] == prompt


def test_metadata_are_the_benchmarks():
    """Lines of its evaluation_metadata.jsonl, of the forms that it has."""
    assert geneval.counting("clock", 3) == json.loads(
        '{"tag": "counting", "include": [{"class": "clock", "count": 3}],'
        ' "exclude": [{"class": "clock", "count": 4}], "prompt": "a photo of three clocks"}'
    )
    assert geneval.position(("dog", "teddy bear"), "right of") == json.loads(
        '{"tag": "position", "include": [{"class": "teddy bear", "count": 1}, {"class": "dog",'
        ' "count": 1, "position": ["right of", 0]}],'
        ' "prompt": "a photo of a dog right of a teddy bear"}'
    )
    assert geneval.color_attr(("bus", "cup"), ("pink", "blue"))["include"] == [
        {"class": "bus", "count": 1, "color": "pink"},
        {"class": "cup", "count": 1, "color": "blue"},
    ]


def test_the_classes_are_cocos():
    assert len(set(geneval.CLASSES)) == 80 and len(set(geneval.UNSEEN)) == 20
    assert geneval.CLASSES[0] == "person" and geneval.CLASSES[-1] == "toothbrush"
    renamed = {"computer mouse", "tv remote", "computer keyboard"}
    assert renamed < set(geneval.CLASSES) and not {"mouse", "remote"} & set(geneval.CLASSES)


# ------------------------------------------------------------------ what a prompt's text shows


def things(prompt):
    """The objects that a prompt names, as (class, colour or None, x, y), read from its words."""
    words = prompt.removeprefix("a photo of ")
    number, _, rest = words.partition(" ")
    if number in NUMBERS:
        cls = rest.removesuffix("s") if rest.removesuffix("s") in geneval.CLASSES else rest[:-2]
        return [(cls, None, 200 * i, 0) for i in range(NUMBERS[number])]
    if match := RELATION.fullmatch(prompt):
        a, relation, b = match.groups()
        dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[
            relation
        ]
        return [(a, None, 200 * dx, 200 * dy), (b, None, 0, 0)]
    found = []
    for i, noun in enumerate(
        re.sub(r"^an? ", "", words).replace(" and an ", " and a ").split(" and a ")
    ):
        color, _, cls = noun.partition(" ")
        colored = color in COLORS and cls in geneval.CLASSES
        found.append((cls, color, 200 * i, 0) if colored else (noun, None, 200 * i, 0))
    return found


def test_metadata_ask_for_what_the_prompt_says(pool, held):
    """A picture drawn after the prompt's words passes; with one object missing it does not."""
    for record in [*held, *pool[::50]]:
        seen = [
            Detection(c, 0.9, (x, y, x + 90, y + 90), k) for c, k, x, y in things(record["prompt"])
        ]
        verdict = score(seen, record)
        assert verdict.strict and verdict.correct and verdict.graded == 1, record
        assert not score(seen[1:], record).strict, record


# ------------------------------------------------------------------------------- the splits


def test_as_many_of_each_tag_as_the_benchmark(held):
    assert Counter(r["tag"] for r in held) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert len({r["prompt"] for r in held}) == 553


def test_the_test_prompts_do_not_change_unnoticed(held):
    """Scores of different versions of this package are compared on them."""
    assert [held[i]["prompt"] for i in (80, 179, 259, 353, 453)] == [
        "a photo of a person and a baseball bat",
        "a photo of two persons",
        "a photo of a red car",
        "a photo of a person left of a bicycle",
        "a photo of a purple bicycle and a black frisbee",
    ]


def meaning(prompt):
    """What is the same for two prompts that differ in the order of their objects alone."""
    if match := RELATION.fullmatch(prompt):
        a, relation, b = match.groups()
        return frozenset((a, b)), relation in ("above", "below")
    return (
        frozenset(things(prompt))
        if " and " not in prompt
        else frozenset((cls, color) for cls, color, _, _ in things(prompt))
    )


def test_no_training_prompt_is_a_test_prompt_with_its_objects_swapped(pool, held):
    taken = {meaning(r["prompt"]) for r in held}
    assert not [r["prompt"] for r in pool if meaning(r["prompt"]) in taken]
    assert len({r["prompt"] for r in pool}) == len(pool)
    counts = Counter(r["tag"] for r in pool)
    # Of every single object there is a test prompt; of 240 counts 80, of 790 colours 94.
    assert counts["single_object"] == 0
    assert (counts["counting"], counts["colors"]) == (160, 696)
    assert counts["two_object"] > 6000 and counts["position"] > 15_000
    assert counts["color_attr"] > 15_000


def test_prompts_of_a_given_file_are_not_trained_on(tmp_path, pool):
    taken = {
        "a photo of a clock left of a zebra": [
            "a photo of a zebra right of a clock",
            "a photo of a zebra left of a clock",
        ],
        "A photo of a cup and an oven.": ["a photo of an oven and a cup"],
        "a photo of three pizzas": ["a photo of three pizzas"],
    }
    before = {r["prompt"] for r in pool}
    file = tmp_path / "test.txt"
    file.write_text("\n".join(taken))
    after = {r["prompt"] for r in prompts.load("geneval:train", prompts.load(str(file)))}
    gone = before - after
    assert after < before and len(gone) <= 4 + 2 + 1
    for twins in taken.values():
        assert not after.intersection(twins)
    assert not after.intersection(taken) and len(gone) >= 4


def test_unseen_objects():
    seen, unseen = prompts.load("geneval:seen"), prompts.load("geneval:unseen")
    classes = [{c for r in split for c, *_ in things(r["prompt"])} for split in (seen, unseen)]
    assert [len(c) for c in classes] == [60, 20] and not classes[0] & classes[1]
    assert len({r["prompt"] for r in unseen}) == 256 and len(seen) > 20_000


@pytest.mark.parametrize("source", ["geneval:val", "ocr:seen"])
def test_no_such_split(source):
    with pytest.raises(ValueError, match=rf"{source}: the split '{source.partition(':')[2]}'"):
        prompts.load(source)


# --------------------------------------------------------------------------------------- OCR


@pytest.fixture(scope="module")
def texts():
    return {split: prompts.load(f"ocr:{split}") for split in ("train", "test")}


def same(text):
    return re.sub(r"\s", "", text).casefold()


def test_ocr_prompts_ask_for_one_text(texts):
    for records in texts.values():
        for record in records:
            (wanted,) = re.findall(r'"([^"]+)"', record["prompt"])
            assert wanted == record["target"] and wanted.isascii() and wanted == wanted.strip()
            assert record["prompt"].count('"') == 2 and "{" not in record["prompt"]
            assert 1 <= len(wanted.split()) <= 5


def test_ocr_splits_have_their_size_and_no_text_in_common(texts):
    assert {k: len({r["prompt"] for r in v}) for k, v in texts.items()} == {
        "train": 20_000,
        "test": 1018,
    }
    train, test = ({same(r["target"]) for r in texts[k]} for k in ("train", "test"))
    assert not train & test and len(test) == 1018 and len(train) > 2000


def test_the_ocr_test_prompts_do_not_change_unnoticed(texts):
    assert [r["prompt"] for r in texts["test"][1:4]] == [
        'A science fair project board with the heading "Endless Whale"',
        'A digital clock radio on a nightstand whose display shows "Bright Island"',
        'A newspaper on a park bench with the headline "Greta\'s Toy Shop"',
    ]


def test_ocr_prompts_are_varied(texts):
    scenes = Counter(re.sub('".*"', "", r["prompt"]) for r in texts["train"])
    assert len(scenes) == 40 and max(scenes.values()) < 2 * min(scenes.values())
    capitals = sum(r["target"].isupper() for r in texts["train"]) / 20_000
    assert 0.2 < capitals < 0.3
    words = Counter(len(r["target"].split()) for r in texts["test"])
    assert min(words[n] for n in (1, 2, 3)) > 10


@pytest.mark.parametrize("space", [" ", "\t", "\u00a0", "  "])
def test_texts_of_a_given_file_are_not_trained_on(texts, space):
    taken = next(r["target"] for r in texts["train"] if " " in r["target"])
    written = taken.upper().replace(" ", space)
    records = prompts.load("ocr:train", [{"prompt": f'Neon says "{written}" now'}])
    assert same(taken) not in {same(r["target"]) for r in records} and len(records) == 20_000


# ------------------------------------------------------------------------------- every host


CHILD = """
import hashlib, json, sys
from flowgrpo_jax import prompts
assert not {"torch", "onnx", "onnxruntime", "rapidocr"} & set(sys.modules)
for source in ("geneval:train", "ocr:train"):
    records = prompts.load(source, [{"prompt": 'a photo of a cup and an oven "OPEN"'}])
    batches = [prompts.sample(records, 48, seed=3, epoch=e).prompts for e in range(3)]
    print(hashlib.sha256(json.dumps([records, batches]).encode()).hexdigest())
"""


def test_every_host_draws_the_same_groups():
    """Whatever the order of its sets and the number of its devices."""
    said = []
    for seed, devices in (("1", 1), ("2", 8)):
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = {"PYTHONHASHSEED": seed, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        said.append(child.stdout.split())
    assert said[0] == said[1] and len(set(said[0])) == 2


def test_the_papers_mix(pool):
    """7 : 5 : 3 : 1 : 1 of the draws, however many prompts a tag has."""
    mix = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    drawn = Counter()
    for epoch in range(60):
        batch = prompts.sample(pool, 17, seed=0, epoch=epoch, tag_weights=mix)
        assert len(set(batch.prompts)) == 17
        drawn.update(r["tag"] for r in batch.metadata)
    for tag, weight in mix.items():  # of 1020 draws; five standard deviations
        share = weight / 17
        assert abs(drawn[tag] - 1020 * share) < 5 * (1020 * share * (1 - share)) ** 0.5
