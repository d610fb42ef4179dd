"""The OCR reward: its rule against a search over edits and hand-worked cases, and PP-OCR itself on
pictures with right, wrong, extra, missing and no text."""

import itertools
import unicodedata
from collections import deque

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from flowgrpo_jax import rewards
from flowgrpo_jax.rewards import ocr
from flowgrpo_jax.rewards.reading_order import reading_order

# ---------------------------------------------------------------------------------- the rule


def distances(start, letters, longest):
    """Distances from one word to all others, by breadth-first search over single edits."""
    found, waiting = {start: 0}, deque([start])
    while waiting:
        word = waiting.popleft()
        places = range(len(word) + 1)
        edits = {word[:i] + word[i + 1 :] for i in places}
        edits |= {word[:i] + c + word[i:] for i in places for c in letters}
        edits |= {word[:i] + c + word[i + 1 :] for i in places for c in letters}
        for new in edits:
            if len(new) <= longest and new not in found:
                found[new] = found[word] + 1
                waiting.append(new)
    return found


def test_the_edit_distance_is_the_least_number_of_edits():
    words = ["".join(w) for n in range(5) for w in itertools.product("ab", repeat=n)]
    for a in words:
        expected = distances(a, "ab", 6)
        for b in words:
            assert ocr.edit_distance(a, b) == expected[b], (a, b)


# wanted, found: strict score, upstream's score
CASES = {
    "right": ("hello", "hello", 1, 1),
    "one letter wrong": ("hello", "hallo", 4 / 5, 4 / 5),
    "one letter missing": ("hello", "hell", 4 / 5, 4 / 5),
    "nothing": ("hello", "", 0, 0),
    "another text of the same length": ("hello", "wacky", 0, 0),
    "a longer text that shares a letter": ("cat", "elephants", 0, 0),
    "one letter too many": ("hello", "hellos", 4 / 5, 1),
    "twice": ("hello", "hellohello", 0, 1),
    "amid other text": ("cat", "acatb", 1 / 3, 1),
    "wrong, and too long": ("cat", "cut!", 1 / 3, 1 / 3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_score_is_the_share_of_letters_that_need_no_edit(name):
    wanted, found, strict, upstream = CASES[name]
    assert ocr.similarity(wanted, found, strict=True) == pytest.approx(strict)
    assert ocr.similarity(wanted, found, strict=False) == pytest.approx(upstream)


def test_the_target_is_in_the_first_pair_of_double_quotes():
    assert ocr.target('a sign that says "Hot Dogs" and not "Cats"') == "hotdogs"
    for prompt in ("a sign", 'a 5" pipe', 'an empty sign ""', 'a sign "  "', "a 'single' one"):
        assert ocr.target(prompt) == ""


@pytest.mark.parametrize("prompt", ["a sign", 'a 5" pipe', 'an empty sign ""', "a 'single' one"])
def test_a_prompt_without_a_quoted_text_is_judged_when_loading(prompt):
    with pytest.raises(ValueError, match="no text between two straight double quotes"):
        ocr.check({"prompt": prompt})
    ocr.check({"prompt": prompt + ' that says "STOP"' if '"' not in prompt else 'a sign "STOP"'})


@pytest.mark.parametrize(
    "prompt", ["a sign \u201cSTOP\u201d", "ein Schild \u201eHALT\u201c", "\u00abOUI\u00bb"]
)
def test_the_error_of_other_quotes_says_what_to_write(prompt):
    with pytest.raises(ValueError, match=r'replace [\u201c\u201e\u00ab] by "'):
        ocr.check({"prompt": prompt})


def test_all_rows_of_the_recogniser_check_their_prompts(monkeypatch):
    monkeypatch.setattr(ocr, "recogniser", lambda *settings: lambda image: "stop")
    for reward in rewards.load(["ocr", "ocr_exact", "ocr_lenient"]).values():
        with pytest.raises(ValueError, match="straight double quotes"):
            reward.check({"prompt": "a stop sign"})


@pytest.mark.parametrize(
    "one, other",
    [
        ("Caf\u00e9 \u00c5ngstr\u00f6m", "cafe\u0301 a\u030angstro\u0308m"),
        ("\ud55c\uad6d", unicodedata.normalize("NFD", "\ud55c\uad6d")),
        ("Clara\u2019s \u2018Bar\u2019", "Clara's 'Bar'"),
        ("5\u2032 10\u2033", "5' 10\""),
        ("\u201cHi\u201d", '"Hi"'),
        ("9\u201317 \u2014 Mon\u2010Fri \u22125", "9-17 - Mon-Fri -5"),
        ("Wait\u2026", "wait..."),
        ("1\u00bd cups, \u00be \u2044 \u215b", "1 1/2 cups, 3/4 / 1/8"),
        ("\uff33\uff34\uff2f\uff30\uff01", "STOP!"),
        ("\ufb01ne \ufb02our", "fine flour"),
        ("Stra\u00dfe", "STRASSE"),
        ("no\u00a0break so\u00adft\u200b \ufeff", "nobreaksoft"),
    ],
)
def test_texts_that_look_alike_are_one(one, other):
    assert ocr.normalised(one) == ocr.normalised(other)


def test_texts_that_look_different_stay_so():
    different = ["cafe", "caf\u00e9", "5-4", "54", "a.b", "a,b", "a/b", "1/2", "o", "0", "l", "1"]
    assert len({ocr.normalised(text) for text in different}) == len(different)


# --------------------------------------------------------------------------- the reading order


def words(lines, *, tilt=0.0, size=1.0, rise=0.0):
    """Boxes [n, 4, 2] of lines of words of these widths, in reading order. They are turned by
    `tilt` degrees, and every second word is raised by `rise` of a line's height."""
    boxes = []
    for row, widths in enumerate(lines):
        x = 0.0
        for i, width in enumerate(widths):
            y = 1.6 * row - rise * (i % 2)
            boxes.append([(x, y), (x + width, y), (x + width, y + 1), (x, y + 1)])
            x += width + 1.0
    angle = np.radians(tilt)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return 40 * size * np.array(boxes) @ turn


LINES = {
    "one line": [[3, 4, 2, 5]],
    "two lines": [[4, 5], [5, 4]],
    "a paragraph": [[2, 6, 3], [5], [1, 1, 7, 1], [4, 4, 4]],
}


@pytest.mark.parametrize("lines", LINES)
@pytest.mark.parametrize("tilt", [-8, -2, 0, 2, 8])
@pytest.mark.parametrize("size", [0.25, 1, 4])
@pytest.mark.parametrize("rise", [0.0, 0.35])
def test_lines_are_read_in_order_whatever_their_tilt_and_size(lines, tilt, size, rise):
    boxes = words(LINES[lines], tilt=tilt, size=size, rise=rise)
    shuffled = np.random.default_rng(0).permutation(len(boxes))
    order = [int(shuffled[i]) for i in reading_order(boxes[shuffled])]
    assert order == list(range(len(boxes)))


def test_nothing_is_in_order():
    assert reading_order(np.zeros((0, 4, 2))) == []


# --------------------------------------------------------------------------- PP-OCR, for real


def picture(*lines, side=256):
    """Black lines on white, uint8 [side, side, 3], in the font that comes with Pillow."""
    image = Image.new("RGB", (side, side), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((20, 40 + 70 * i), line, "black", ImageFont.load_default(40))
    return np.asarray(image)


@pytest.fixture(scope="module")
def both():
    """Scores of pictures under one prompt, strict and as upstream."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    strict = rewards.load(["ocr"])["ocr"]
    lenient = rewards.load(["ocr"], {"ocr": {"strict": False, "workers": 1}})["ocr"]

    def score(images, prompts):
        results = [r(np.stack(images), prompts, [{}] * len(images)) for r in (strict, lenient)]
        assert all(scores.dtype == np.float32 for scores, _ in results)
        np.testing.assert_array_equal(results[0][1], results[1][1])
        return results[0][0], results[1][0], results[0][1]

    return score


def test_pictures_score_what_can_be_read_in_them(both):
    pictures = {
        "right": picture("HELLO"),
        "other case and a space": picture("Hel lo"),
        "wrong": picture("JUMPY"),
        "extra": picture("HELLO", "HELLO"),
        "one letter missing": picture("HELO"),
        "none": picture(),
    }
    strict, upstream, valid = both(list(pictures.values()), ['a sign "Hello"'] * len(pictures))
    assert valid.all()
    np.testing.assert_allclose(strict, [1, 1, 0, 0, 0.8, 0], atol=1e-6)
    np.testing.assert_allclose(upstream, [1, 1, 0, 1, 0.8, 0], atol=1e-6)


def test_lines_are_read_in_order_and_colours_do_not_matter(both):
    two = picture("GRAND", "HOTEL")
    blue = np.where(two == 0, np.array([30, 30, 200], np.uint8), two)
    for image in (two, blue):
        strict, _, valid = both([image], ['a facade with "Grand Hotel" on it'])
        assert strict[0] == 1 and valid[0]


def test_a_word_that_stands_higher_is_read_in_its_place(both):
    image = Image.new("RGB", (384, 256), "white")
    for text, place in (("LEFT", (20, 110)), ("RIGHT", (220, 95))):
        ImageDraw.Draw(image).text(place, text, "black", ImageFont.load_default(40))
    strict, _, _ = both([np.asarray(image)], ['a sign "Left Right"'])
    assert strict[0] == 1


def test_a_prompt_without_a_target_is_invalid_alone(both, caplog):
    prompts = ['"STOP"', "a stop sign", 'a 5" pipe']
    strict, _, valid = both([picture("STOP")] * 3, prompts)
    np.testing.assert_array_equal(valid, [True, False, False])
    np.testing.assert_array_equal(strict, [1, 0, 0])
    assert "2 of 3 prompts have no text in double quotes, such as 'a stop sign'" in caplog.text


def test_a_picture_that_cannot_be_read_is_invalid_alone(both, monkeypatch, caplog):
    def failing(*settings):
        read = recogniser(*settings)

        def sometimes(image):
            if not image.any():
                raise RuntimeError("the engine failed")
            return read(image)

        return sometimes

    recogniser = ocr.recogniser
    monkeypatch.setattr(ocr, "recogniser", failing)
    reward = ocr.make(workers=2)
    black = np.zeros((256, 256, 3), np.uint8)
    scores, valid = reward(np.stack([black, picture("STOP")]), ['"STOP"'] * 2, [{}] * 2)
    np.testing.assert_array_equal(scores, [0, 1])
    np.testing.assert_array_equal(valid, [False, True])
    assert "the engine failed" in caplog.text


def test_rewards_of_the_same_options_read_a_picture_once(monkeypatch):
    looks = []

    def counted(*settings):
        return lambda image: looks.append(settings) or "stop stop"

    monkeypatch.setattr(ocr, "recogniser", counted)
    rows = rewards.load(["ocr", "ocr_lenient", "ocr_exact"], {"ocr": {"workers": 1}})
    batch = np.stack([picture("STOP"), picture("GO")]), ['"stop"', '"stop"'], [{}] * 2
    assert rows["ocr"](*batch)[0].tolist() == [0, 0]
    assert rows["ocr_lenient"](*batch)[0].tolist() == [1, 1]
    assert rows["ocr_exact"](batch[0], ['"stop"', '"Stop stop"'], [{}] * 2)[0].tolist() == [0, 1]
    assert len(looks) == 2
    # What the rows are by does not depend on how `ocr` itself is set.
    for options in ({"workers": 1, "strict": False}, {"workers": 1, "exact": True}):
        again = rewards.load(["ocr_lenient", "ocr_exact"], {"ocr": options})
        assert again["ocr_lenient"](*batch)[0].tolist() == [1, 1]
        assert again["ocr_exact"](*batch)[0].tolist() == [0, 0]
    rewards.load(["ocr"], {"ocr": {"workers": 1, "upscale": 2}})["ocr"](*batch)
    assert len(looks) == 4


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r"flowgrpo_jax\[ocr\]"):
        rewards.load(["ocr"], {"ocr": {"workers": 7}})  # of no reader that is there already


@pytest.mark.parametrize("option", ["workers", "upscale"])
def test_less_than_one_is_an_error(option):
    pytest.importorskip("rapidocr")
    with pytest.raises(ValueError, match=f"{option}=0 must be at least 1"):
        ocr.make(**{option: 0})
