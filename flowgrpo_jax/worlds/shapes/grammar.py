"""Prompts of the shapes world, their splits, and scenes that show them.

Prompts and metadata follow GenEval: six tags, `include` clauses with class, count and
optionally colour or position, and for counting an `exclude` clause.

Splits. Each prompt is made of combinations, some of which are held out for good:

    single_object   its shape                                1 of 6 held out
    two_object      its unordered pair of shapes             3 of 15
    counting        its (shape, count)                       4 of 18
    colors          its (colour, shape) binding             12 of 48
    position        its unordered pair of shapes             3 of 15
    color_attr      its pair of shapes and both its bindings

A prompt is in `train` if none of its combinations is held out and in `test` if all of
them are, so no combination of a test prompt occurs in the train prompts of its tag, and
no pair, binding or (shape, count above one) of a test prompt occurs in any train prompt at all.
Prompts of color_attr that mix the two are in neither split, only in `all`. Every shape,
colour, count and relation occurs in train.
"""

from itertools import permutations, product

import numpy as np

from flowgrpo_jax.worlds.shapes.render import COLORS, SHAPES, Scene, Thing

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {  # relation -> (its opposite, unit step in image coordinates, y down)
    "left of": ("right of", (-1, 0)),
    "right of": ("left of", (1, 0)),
    "above": ("below", (0, -1)),
    "below": ("above", (0, 1)),
}
RADII = (8.0, 11.0)  # px
GAP = 3.0  # px between any two discs
MARGIN = 1.0  # px between a disc and the image border
LENGTH = 10  # tokens of the longest caption, start and end included

HELD_SHAPES = {"cross"}
HELD_COUNTS = {("circle", 3), ("square", 4), ("triangle", 2), ("star", 3)}
# A perfect matching: every shape loses one partner of five.
HELD_PAIRS = {frozenset(pair) for pair in zip(SHAPES[:3], SHAPES[3:], strict=True)}
# Every shape loses two colours of eight, every colour one or two shapes of six.
HELD_BINDINGS = {
    (color, shape)
    for (i, color), (j, shape) in product(enumerate(COLORS), enumerate(SHAPES))
    if (i + j) % 4 == 0
}


# ---------------------------------------------------------------- prompts


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _metadata(tag, prompt, *include, **more):
    return {"tag": tag, "include": list(include), **more, "prompt": prompt}


def _one(shape, **more):
    return {"class": shape, "count": 1, **more}


def single_object(shape):
    return _metadata("single_object", _a(shape), _one(shape))


def two_object(first, second):
    return _metadata("two_object", f"{_a(first)} and {_a(second)}", _one(first), _one(second))


def counting(shape, count):
    asked, too_many = {"class": shape, "count": count}, {"class": shape, "count": count + 1}
    return _metadata("counting", f"{COUNTS[count]} {_plural(shape)}", asked, exclude=[too_many])


def colors(color, shape):
    return _metadata("colors", _a(f"{color} {shape}"), _one(shape, color=color))


def position(subject, relation, target):
    # As in GenEval the reference object comes first and the other clause points back at it.
    clauses = _one(target), _one(subject, position=[relation, 0])
    return _metadata("position", f"{_a(subject)} {relation} {_a(target)}", *clauses)


def color_attr(color1, shape1, color2, shape2):
    prompt = f"{_a(f'{color1} {shape1}')} and {_a(f'{color2} {shape2}')}"
    return _metadata("color_attr", prompt, _one(shape1, color=color1), _one(shape2, color=color2))


def described(color1, shape1, relation, color2, shape2):
    prompt = f"{_a(f'{color1} {shape1}')} {relation} {_a(f'{color2} {shape2}')}"
    subject = _one(shape1, color=color1, position=[relation, 0])
    return _metadata("described", prompt, _one(shape2, color=color2), subject)


def descriptions() -> list[dict]:
    """Full descriptions of two objects, for pretraining alone: they are no prompts.

    In a caption without colours a relation only says which outline is where, which hardly shows
    in the pretraining loss; in these it says which colour is where.
    """
    pairs, palettes = list(permutations(SHAPES, 2)), list(permutations(COLORS, 2))
    everything = product(pairs, palettes, RELATIONS)
    return [described(c, a, r, d, b) for (a, b), (c, d), r in everything]


def _enumerate(tag: str) -> list[dict]:
    pairs = list(permutations(SHAPES, 2))
    match tag:
        case "single_object":
            return [single_object(s) for s in SHAPES]
        case "two_object":
            return [two_object(a, b) for a, b in pairs]
        case "counting":
            return [counting(s, n) for s, n in product(SHAPES, COUNTS)]
        case "colors":
            return [colors(c, s) for c, s in product(COLORS, SHAPES)]
        case "position":
            return [position(a, r, b) for (a, b), r in product(pairs, RELATIONS)]
        case "color_attr":
            palettes = list(permutations(COLORS, 2))
            return [color_attr(c, a, d, b) for (a, b), (c, d) in product(pairs, palettes)]
    raise ValueError(f"tag {tag!r} is not one of {TAGS}")


def held_out(metadata: dict) -> list[bool]:
    """Return, for each combination in the prompt, whether it is held out from training."""
    include = metadata["include"]
    shapes = [clause["class"] for clause in include]
    pair = frozenset(shapes) in HELD_PAIRS
    bindings = [(clause.get("color"), clause["class"]) in HELD_BINDINGS for clause in include]
    return {
        "single_object": [shapes[0] in HELD_SHAPES],
        "two_object": [pair],
        "counting": [(shapes[0], include[0]["count"]) in HELD_COUNTS],
        "colors": bindings,
        "position": [pair],
        "color_attr": [pair, *bindings],
    }[metadata["tag"]]


def prompts(split: str, tag: str | None = None) -> list[dict]:
    """Return the metadata of a split ("train", "test" or "all") in a fixed order, of one tag
    or of all six. Raises ValueError for an unknown split or tag."""
    keep = {"train": lambda held: not any(held), "test": all, "all": lambda held: True}
    if split not in keep:
        raise ValueError(f"split {split!r} is not one of {tuple(keep)}")
    everything = [m for t in ([tag] if tag else TAGS) for m in _enumerate(t)]
    return [m for m in everything if keep[split](held_out(m))]


def vocabulary() -> list[str]:
    """Every word of every prompt, sorted."""
    return sorted({word for m in prompts("all") for word in m["prompt"].split()})


# ---------------------------------------------------------------- scenes


def sample_scene(metadata: dict, rng: np.random.Generator, size: int = 64) -> Scene:
    """A random scene with exactly the objects that `metadata` includes, in that order.

    Colours that the prompt leaves open are random, radii uniform in RADII (px); when the
    objects do not fit, the largest radius allowed shrinks. Raises ValueError if they do
    not fit in `size` px even at the smallest radius.
    """
    clauses = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    low, high = RADII
    for largest in np.repeat(np.linspace(high, low, 7), 4):
        radii = rng.uniform(low, largest, len(clauses))
        centres = _layouts(radii, rng, size, tries=128)
        fits = _apart(centres, radii) & _related(centres, clauses, metadata["include"])
        if fits.any():
            painted = [clause.get("color") or _other(COLORS, rng) for clause in clauses]
            return tuple(
                Thing(clause["class"], color, float(x), float(y), float(radius))
                for clause, color, (x, y), radius in zip(
                    clauses, painted, centres[fits.argmax()], radii, strict=True
                )
            )
    raise ValueError(
        f"no room for {len(clauses)} objects of radius {low} px in {size} px "
        f"({metadata['prompt']!r}): ask for fewer objects or a larger picture"
    )


def _layouts(radii, rng, size, tries):
    """Centres [tries, n, 2], uniform where each disc is inside the image."""
    reach = radii[:, None] + MARGIN
    return reach + rng.random((tries, len(radii), 2)) * (size - 2 * reach)


def _apart(centres, radii):
    """Return whether each layout [tries, n, 2] keeps all discs at least GAP apart."""
    i, j = np.triu_indices(len(radii), 1)
    distance = np.linalg.norm(centres[:, i] - centres[:, j], axis=-1)
    return (distance >= radii[i] + radii[j] + GAP).all(-1)


def _related(centres, clauses, include):
    """Return whether each layout shows the relations clearly.

    A relation is clear if the offset points the right way and is at most half as long across
    (27 degrees), well inside GenEval's rule.
    """
    ok = np.ones(len(centres), bool)
    for i, clause in enumerate(clauses):
        if "position" not in clause:
            continue
        relation, target = clause["position"]
        step = np.array(RELATIONS[relation][1])
        for j in (j for j, other in enumerate(clauses) if other is include[target]):
            offset = centres[:, i] - centres[:, j]
            along, across = offset @ step, np.abs(offset @ step[::-1])
            ok &= across <= 0.5 * along
    return ok


# ---------------------------------------------------------------- wrong captions


def _other(options, rng, *used):
    rest = [option for option in options if option not in used]
    return rest[rng.integers(len(rest))]


def garble(metadata: dict, rng: np.random.Generator) -> dict:
    """Metadata of a scene that a careless captioner would have described as `metadata`:
    one attribute differs, by tag:

    single_object: another shape, or an extra object; two_object: one shape replaced, or
    one object missing; counting: one more or one less (1..4); colors: another colour;
    position: the opposite relation (3 in 4) or a crosswise one; color_attr: the colours
    swapped, or one of them replaced; described: the opposite relation, or the colours swapped.
    The result is again metadata of the grammar.
    """
    include, coin = metadata["include"], rng.random() < 0.5
    a, b = include[0], include[-1]
    match metadata["tag"]:
        case "single_object":
            other = _other(SHAPES, rng, a["class"])
            return single_object(other) if coin else two_object(a["class"], other)
        case "two_object":
            kept = (a, b)[rng.integers(2)]["class"]
            new = _other(SHAPES, rng, a["class"], b["class"])
            return single_object(kept) if coin else two_object(kept, new)
        case "counting":
            n = a["count"] + (-1 if coin or a["count"] == max(COUNTS) else 1)
            return counting(a["class"], n) if n > 1 else single_object(a["class"])
        case "colors":
            return colors(_other(COLORS, rng, a["color"]), a["class"])
        case "position":
            relation = b["position"][0]
            opposite = RELATIONS[relation][0]
            wrong = opposite if rng.random() < 0.75 else _other(RELATIONS, rng, relation, opposite)
            return position(b["class"], wrong, a["class"])
        case "color_attr":
            if coin:
                return color_attr(b["color"], a["class"], a["color"], b["class"])
            new = _other(COLORS, rng, a["color"], b["color"])
            first, second = (new, b["color"]) if rng.random() < 0.5 else (a["color"], new)
            return color_attr(first, a["class"], second, b["class"])
        case "described":
            relation = b["position"][0]
            if coin:
                opposite = RELATIONS[relation][0]
                return described(b["color"], b["class"], opposite, a["color"], a["class"])
            return described(a["color"], b["class"], relation, b["color"], a["class"])
    raise ValueError(f"tag {metadata['tag']!r} is neither one of {TAGS} nor 'described'")
