"""Prompts in the form of GenEval, with the metadata that score them (rewards/geneval.py).

    geneval:train    COCO's 80 classes
    geneval:test     553 prompts, as many of each tag as the benchmark has
    geneval:seen     60 of the classes, to train on
    geneval:unseen   256 prompts of the other 20 classes, to evaluate on

The wording is that of the benchmark (Ghosh et al. 2023, arXiv 2310.11513), its articles and plurals
("skises", "knifes") included. No training prompt is in `geneval:test` or in the prompts given to
be excluded, nor is a twin of one: the same with its two objects swapped, and for positions any
statement about the same two classes along the same axis. The benchmark asks for all 80 classes as
single objects, so there are none of those to train on; Flow-GRPO's mix of the tags (the recipe's
`prompts.tag_weights`) gives them weight 0 anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from flowgrpo_jax.detection.coco import CLASSES
from flowgrpo_jax.detection.colors import COLORS
from flowgrpo_jax.types import Metadata

UNSEEN = CLASSES[3::4]  # every fourth, so that each of COCO's supercategories keeps most of its own
COUNTS = {2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TEST = dict(single_object=80, two_object=99, counting=80, colors=94, position=100, color_attr=100)
UNSEEN_TEST = dict(
    single_object=20, two_object=48, counting=44, colors=48, position=48, color_attr=48
)
POOL = 20_000  # most training prompts of a tag; color_attr alone has half a million


# ------------------------------------------------------------------------------- one prompt


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(cls: str) -> str:
    """The benchmark's rule, which is not English: "buses", and also "knifes"."""
    return cls + ("es" if cls.endswith("s") else "s")


def _record(tag: str, words: str, *include: Metadata, **more: Any) -> Metadata:
    return {"tag": tag, "include": list(include), **more, "prompt": f"a photo of {words}"}


def _one(cls: str, **more: Any) -> Metadata:
    return {"class": cls, "count": 1, **more}


def single_object(cls: str) -> Metadata:
    return _record("single_object", article(cls), _one(cls))


def two_object(pair: tuple[str, str]) -> Metadata:
    a, b = pair
    return _record("two_object", f"{article(a)} and {article(b)}", _one(a), _one(b))


def counting(cls: str, count: int) -> Metadata:
    exclude = [{"class": cls, "count": count + 1}]
    words = f"{COUNTS[count]} {plural(cls)}"
    return _record("counting", words, {"class": cls, "count": count}, exclude=exclude)


def colors(color: str, cls: str) -> Metadata:
    return _record("colors", article(f"{color} {cls}"), _one(cls, color=color))


def position(pair: tuple[str, str], relation: str) -> Metadata:
    a, b = pair  # the reference comes first, and the other clause points back at it
    clauses = _one(b), _one(a, position=[relation, 0])
    return _record("position", f"{article(a)} {relation} {article(b)}", *clauses)


def color_attr(pair: tuple[str, str], palette: tuple[str, str]) -> Metadata:
    (a, b), (c, d) = pair, palette
    words = f"{article(f'{c} {a}')} and {article(f'{d} {b}')}"
    return _record("color_attr", words, _one(a, color=c), _one(b, color=d))


def twins(record: Metadata) -> set[str]:
    """Prompts that count as the same, itself included: objects swapped, relations turned round."""
    first, last = record["include"][0], record["include"][-1]
    a, b = first["class"], last["class"]
    match record["tag"]:
        case "two_object":
            same = [two_object((a, b)), two_object((b, a))]
        case "color_attr":
            same = [record, color_attr((b, a), (last["color"], first["color"]))]
        case "position":
            axis = (last["position"][0], OPPOSITE[last["position"][0]])
            same = [position(pair, relation) for pair in ((a, b), (b, a)) for relation in axis]
        case _:
            same = [record]
    return {r["prompt"] for r in same}


# ------------------------------------------------------------------------------- all of them


def draw(tag: str, classes: Sequence[str], n: int, seed: int) -> list[Metadata]:
    """Return n distinct prompts of a tag, or every one if there are fewer; always the same ones."""
    colorful = [c for c in classes if c != "person"]  # as the benchmark: no coloured people
    kinds: dict[str, tuple[Any, list[Any]]] = {
        "single_object": (single_object, [classes]),
        "two_object": (two_object, [list(permutations(classes, 2))]),
        "counting": (counting, [classes, list(COUNTS)]),
        "colors": (colors, [COLORS, colorful]),
        "position": (position, [list(permutations(classes, 2)), list(OPPOSITE)]),
        "color_attr": (
            color_attr,
            [list(permutations(colorful, 2)), list(permutations(COLORS, 2))],
        ),
    }
    make, choices = kinds[tag]
    sizes = [len(c) for c in choices]
    size = math.prod(sizes)
    rng = np.random.default_rng([seed, list(TEST).index(tag)])
    picked = rng.choice(size, min(n, size), replace=False)
    rows = zip(*np.unravel_index(np.sort(picked), sizes))
    return [make(*(c[i] for c, i in zip(choices, row))) for row in rows]


def plain(prompt: str) -> str:
    """Return a prompt in the form for comparisons: no case, outer spaces or final full stop."""
    return prompt.strip().rstrip(".").lower()


def prompts(split: str, exclude: Iterable[Metadata] = ()) -> list[Metadata]:
    """Return the records of a split, in a fixed order.

    Args:
      split: train, test, seen or unseen.
      exclude: records whose prompts, twins included, must not be in a training split.
    """
    if split == "test":
        return [r for tag, n in TEST.items() for r in draw(tag, CLASSES, n, seed=1)]
    if split == "unseen":
        return [r for tag, n in UNSEEN_TEST.items() for r in draw(tag, UNSEEN, n, seed=2)]
    if split not in ("train", "seen"):
        raise ValueError(f"geneval:{split}: the split {split!r} is not train, test, seen or unseen")
    classes = [c for c in CLASSES if split == "train" or c not in UNSEEN]
    held_out = {plain(r["prompt"]) for r in [*prompts("test"), *exclude]}
    pool = (r for tag in TEST for r in draw(tag, classes, POOL, seed=0))
    return [r for r in pool if held_out.isdisjoint(twins(r))]
