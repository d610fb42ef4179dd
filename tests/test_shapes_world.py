"""The shapes world: splits, metadata, and whether the verifier reads what the renderer drew."""

from itertools import chain, combinations, product

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from flowgrpo_jax.worlds.shapes import grammar
from flowgrpo_jax.worlds.shapes.render import (
    BACKGROUND,
    COLORS,
    OUTLINES,
    PALETTE,
    SHAPES,
    Thing,
    coverage,
    render,
)
from flowgrpo_jax.worlds.shapes.verify import UNKNOWN, detect, judge
from flowgrpo_jax.worlds.shapes.world import WORLD

SCENES_PER_TAG = 100


@pytest.fixture(scope="module")
def scenes():
    """600 (metadata, scene), all tags alike."""
    rng = np.random.default_rng(7)
    drawn = []
    for tag in grammar.TAGS:
        pool = grammar.prompts("all", tag)
        chosen = [pool[i] for i in rng.integers(len(pool), size=SCENES_PER_TAG)]
        drawn += [(metadata, grammar.sample_scene(metadata, rng)) for metadata in chosen]
    return drawn


def pair(metadata):
    return frozenset(clause["class"] for clause in metadata["include"])


def bindings(metadata):
    return {(clause["color"], clause["class"]) for clause in metadata["include"]}


# What must not be shared between the splits of a tag, read off the prompt's own metadata.
COMBINATIONS = {
    "single_object": lambda m: pair(m),
    "two_object": lambda m: {pair(m)},
    "counting": lambda m: {(m["include"][0]["class"], m["include"][0]["count"])},
    "colors": bindings,
    "position": lambda m: {pair(m)},
    "color_attr": lambda m: {pair(m)} | bindings(m),
}


@pytest.mark.parametrize("tag", grammar.TAGS)
def test_splits_share_no_combination(tag):
    train, test = (
        set(chain.from_iterable(COMBINATIONS[tag](m) for m in grammar.prompts(split, tag)))
        for split in ("train", "test")
    )
    assert train and test and not train & test


def test_pairs_bindings_and_counts_of_test_prompts_occur_in_no_train_prompt():
    def used(split):
        several = [m for m in grammar.prompts(split) if len(m["include"]) == 2]
        painted = [m for m in grammar.prompts(split) if m["tag"] in ("colors", "color_attr")]
        clauses = [clause for m in grammar.prompts(split) for clause in m["include"]]
        counts = {(c["class"], c["count"]) for c in clauses if c["count"] > 1}
        return (
            {pair(m) for m in several} | set(chain.from_iterable(map(bindings, painted))) | counts
        )

    assert not used("train") & used("test")


def test_everything_occurs_in_training():
    train = grammar.prompts("train")
    clauses = [clause for m in train for clause in m["include"]]
    assert {c["class"] for c in clauses} == set(SHAPES)
    assert {c["color"] for c in clauses if "color" in c} == set(COLORS)
    assert {c["count"] for c in clauses} == {1, 2, 3, 4}
    assert {c["position"][0] for c in clauses if "position" in c} == set(grammar.RELATIONS)
    assert {m["tag"] for m in train} == set(grammar.TAGS)


def test_prompts_are_distinct_and_splits_are_part_of_all():
    everything = [m["prompt"] for m in grammar.prompts("all")]
    assert len(set(everything)) == len(everything)
    train, test = ([m["prompt"] for m in grammar.prompts(s)] for s in ("train", "test"))
    assert set(train) | set(test) <= set(everything)
    assert max(len(prompt.split()) for prompt in everything) == 7
    assert grammar.vocabulary() == sorted(set(" ".join(everything).split()))


def test_metadata_have_genevals_form():
    by_prompt = {m["prompt"]: m for m in grammar.prompts("all")}
    assert by_prompt["a circle left of a square"] == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1},
            {"class": "circle", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a circle left of a square",
    }
    assert by_prompt["three crosses"] == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "three crosses",
    }
    assert by_prompt["a red circle and an orange square"]["include"] == [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 1, "color": "orange"},
    ]
    with pytest.raises(ValueError, match="split 'validation'"):
        grammar.prompts("validation")
    with pytest.raises(ValueError, match="tag 'size'"):
        grammar.prompts("all", "size")


def test_scenes_keep_their_distance(scenes):
    for _, scene in scenes:
        for a in scene:
            reach = a.radius + grammar.MARGIN
            assert reach <= min(a.x, a.y) and max(a.x, a.y) <= 64 - reach
        for a, b in combinations(scene, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + grammar.GAP - 1e-6
    with pytest.raises(ValueError, match="no room for 4 objects"):
        grammar.sample_scene(grammar.counting("star", 4), np.random.default_rng(0), size=32)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_lie_in_their_disc(shape):
    x, y = np.meshgrid(np.linspace(-2, 2, 801), np.linspace(-2, 2, 801))
    inside = OUTLINES[shape](x, y) < 0
    assert 0.95 < np.hypot(x, y)[inside].max() <= 1.01
    _, _, share = coverage(Thing(shape, "red", 30.3, 29.8, 9.5), 64)
    assert share.sum() == pytest.approx(inside.mean() * 16 * 9.5**2, rel=0.02)


def test_render_paints_palette_on_background():
    image = render((Thing("square", "green", 20, 30, 10),))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert tuple(image[30, 20]) == PALETTE["green"] and tuple(image[5, 60]) == BACKGROUND
    assert tuple(image[30, 40]) == BACKGROUND


def strict(images, metadatas):
    return np.mean([judge(i, m).strict for i, m in zip(images, metadatas, strict=True)])


def degraded(image, rng, sigma, noise):
    soft = gaussian_filter(image.astype(float), (sigma, sigma, 0)) + rng.normal(
        0, noise, image.shape
    )
    return np.clip(soft, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("sigma, noise, least", [(0, 0, 0.99), (0.7, 6, 0.97), (1.2, 10, 0.95)])
def test_verifier_reads_what_was_drawn(scenes, sigma, noise, least):
    rng = np.random.default_rng(1)
    images = [degraded(render(scene), rng, sigma, noise) for _, scene in scenes]
    assert strict(images, [m for m, _ in scenes]) >= least


def test_detections_name_shape_colour_and_place(scenes):
    for _, scene in scenes[:100]:
        found = detect(render(scene))
        assert sorted(d[::3] for d in found) == sorted((t.shape, t.color) for t in scene)
        for d in found:
            near = [t for t in scene if d.box[0] < t.x < d.box[2] and d.box[1] < t.y < d.box[3]]
            assert [(t.shape, t.color) for t in near] == [(d.cls, d.color)]


def test_garbled_scenes_fail_their_caption(scenes):
    rng = np.random.default_rng(2)
    captions = [m for m, _ in scenes] + grammar.descriptions()[::61]
    garbled = [grammar.garble(m, rng) for m in captions]
    known = {m["prompt"] for m in WORLD.captions()}
    assert all(
        g["prompt"] in known and g["include"] != m["include"]
        for g, m in zip(garbled, captions, strict=True)
    )
    images = [render(grammar.sample_scene(g, rng)) for g in garbled]
    assert strict(images, captions) <= 0.01
    assert strict(images, garbled) >= 0.99


def test_garbling_every_prompt_stays_in_the_grammar():
    rng = np.random.default_rng(3)
    captions = WORLD.captions()
    known = {m["prompt"] for m in captions}
    assert len(known) == len(captions)
    assert max(len(prompt.split()) for prompt in known) + 2 == grammar.LENGTH
    for metadata in captions:
        assert grammar.garble(metadata, rng)["prompt"] in known - {metadata["prompt"]}


def test_a_description_says_all_that_is_shown():
    rng = np.random.default_rng(4)
    for metadata in grammar.descriptions()[::397]:
        words = metadata["prompt"].split()
        subject, relation, target = words[1:3], " ".join(words[3:-3]), words[-2:]
        shown = {(t.color, t.shape): t for t in grammar.sample_scene(metadata, rng)}
        a, b = shown.pop(tuple(subject)), shown.pop(tuple(target))
        assert not shown
        ahead = {
            "left of": b.x - a.x,
            "right of": a.x - b.x,
            "above": b.y - a.y,
            "below": a.y - b.y,
        }
        assert ahead[relation] > grammar.RADII[0]


@pytest.mark.parametrize("second", ["blue", "red", "black", "purple", "green", "orange", "yellow"])
@pytest.mark.parametrize("first", ["blue", "pink"])
def test_fused_shapes_are_unknown_in_any_colours(first, second):
    """Pink is nearest to the background: beside it, others' contrast was twice its own."""
    apart = 11  # px between centres; both radii are 10
    for a, b in product(SHAPES, SHAPES):
        image = render((Thing(a, first, 26, 32, 10), Thing(b, second, 26 + apart, 32, 10)))
        worn = degraded(image, np.random.default_rng(0), 0.7, 6)
        assert [d.cls for d in detect(worn)] == [UNKNOWN], (a, b)


@pytest.mark.parametrize("pale", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("apart", [16, 17, 18])
@pytest.mark.parametrize("second", ["black", "red", "blue"])
def test_touching_circles_are_unknown_also_when_one_is_pale(second, apart, pale):
    """Or a policy that draws its pink a little paler could let shapes touch."""
    scene = Thing("circle", "pink", 22, 32, 10), Thing("circle", second, 22 + apart, 32, 10)
    image = render(scene).astype(float)
    pink = (image == PALETTE["pink"]).all(-1)
    image[pink] += pale * np.subtract(BACKGROUND, PALETTE["pink"])
    worn = degraded(image, np.random.default_rng(0), 0.7, 6)
    assert [d.cls for d in detect(worn)] == [UNKNOWN]


def test_smears_rings_and_turned_shapes_are_unknown():
    y, x = np.mgrid[:64, :64] - 31.5
    masks = {
        "smear": (x / 20) ** 2 + (y / 5) ** 2 < 1,
        "ring": (np.hypot(x, y) < 11) & (np.hypot(x, y) > 6),
        "half disc": (np.hypot(x, y) < 11) & (y > 0),
        "upside-down triangle": OUTLINES["triangle"](x / 10, -y / 10) < 0,
        "turned cross": OUTLINES["cross"]((x + y) / 14, (x - y) / 14) < 0,
    }
    for name, mask in masks.items():
        image = np.where(mask[..., None], PALETTE["red"], BACKGROUND).astype(np.uint8)
        assert [(d.cls, d.color) for d in detect(image)] == [(UNKNOWN, "red")], name


def test_specks_are_ignored_but_medium_blobs_are_not():
    image = render((Thing("circle", "red", 20, 20, 9),))
    image[50:53, 50:53] = PALETTE["blue"]
    assert [d.cls for d in detect(image)] == ["circle"]
    image[48:52, 40:60] = PALETTE["blue"]
    assert sorted(d.cls for d in detect(image)) == ["circle", UNKNOWN]
    assert not judge(image, grammar.single_object("circle")).strict


def test_unclear_colours_have_no_name():
    image = np.empty((64, 64, 3), np.uint8)
    image[:] = BACKGROUND
    image[20:36, 20:28], image[20:36, 28:36] = PALETTE["red"], PALETTE["blue"]
    assert detect(image)[0][::3] == ("square", None)
    image[20:36, 20:36] = (128, 128, 128)
    assert detect(image)[0][::3] == ("square", None)


def test_detect_of_nothing_and_of_the_wrong_type():
    blank = np.full((64, 64, 3), BACKGROUND, np.uint8)
    assert detect(blank) == []
    assert [d.cls for d in detect(np.zeros_like(blank))] == [UNKNOWN]
    with pytest.raises(ValueError, match="uint8"):
        detect(blank / 255.0)
