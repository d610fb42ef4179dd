"""Marks and verdicts in the answers of judges, each read by hand, and those that are not clear."""

import re

import pytest

from flowgrpo_jax.rewards import answers, preference
from flowgrpo_jax.rewards.answers import Unclear


def mark(answer, pattern=None, low=1.0, high=5.0):
    return answers.mark(answer, pattern and re.compile(pattern), low, high)


CLEAR = {
    "Final Score: 4": 4,
    "**Final Score:** 3.5": 3.5,
    "Final Score: **4**": 4,
    "Final Score: 4.": 4,
    "Final Score:\n\n4\n5. There is more to say.": 4,
    "Final Score: 4,5": 4.5,
    "Final Score: 4/5": 4,
    "Final Score: **4** / **5**": 4,
    "Final Score: 4 out of 5": 4,
    "Final Score: 4 (on a scale of 1 to 5)": 4,
    "Final Score: 5/5.": 5,
    "Final Score\uff1a\uff14": 4,
    "Final Score: $4$": 4,
    "Final Score: 4, because 3 of 4 cats are there": 4,
    "score = 2": 2,
    "<score>5</score>": 5,
    '{"score": 4, "reason": "2 cats"}': 4,
    '{"overall_score": 4}': 4,
    "The score: 3": 3,
    "final score: 1, no, FINAL SCORE: 2.": 2,
    "Alignment score: 2. Quality: good.\nFinal Score: 4.5": 4.5,
    "Score: 2\nScore: 3\nFinal Score: 3": 3,
    "<think>Final Score: 1?</think>Final Score: 4": 4,
    "Is it a 1? Final Score: 1.</think>Final Score: 4": 4,
}
UNCLEAR = {
    "": "no verdict",
    "the score (1-5): 2": "no verdict",
    "Final Score: five": "no verdict",
    "Final Score: between 3 and 4": "no verdict",
    "Final Score: 4 if the cat were there. Final Score: not 4": "no verdict",
    "1. Alignment (score: 5)\n2. Quality: the image is blurred and": "no verdict",
    "Alignment score: 5. Quality: good.": "no verdict",
    "Alignment\nScore: 5\nQuality\nScore: 2": "2 scores, none of them final",
    "Final Score: 0.5": "not from 1 to 5",
    "Final Score: .5": "not from 1 to 5",
    "Final Score: -4": "not from 1 to 5",
    "Final Score: \u22124": "not from 1 to 5",
    "Final Score: 17": "not from 1 to 5",
    "Final Score: 5/10": "on a scale to 10, not to 5",
    "Final Score: **5**/10": "on a scale to 10, not to 5",
    "<score>5</score>/10": "on a scale to 10, not to 5",
    "Final Score: 5 out of 10": "on a scale to 10, not to 5",
    "Final Score: 4 out of ten": "the scale of the mark .* is not clear: it must end in /5",
    "Final Score: 4 / five": "the scale of the mark",
    "Final Score: 4\u204410": "the scale of the mark",
    "Final Score: 4\n/10": "the scale of the mark",
    "Final Score: 4 on a 10-point scale": "the scale of the mark",
    "Final Score: 4 on a 1-10 scale": "the scale of the mark",
    "Final Score: 4 vs 5": "the scale of the mark",
    "Final Score: 5 (on a scale from 1 to 10)": "on a scale to 10, not to 5",
    "Final Score: 5 points of 100": "on a scale to 100, not to 5",
    "Final Score: 0.9/1": "on a scale to 1, not to 5",
    "Final Score: 4%": "on a scale to 100, not to 5",
    "Final Score: 4-5": "not give one mark",
    "Final Score: 4\u20135": "not give one mark",
    "Final Score: 4 or 5": "not give one mark",
    "Final Score: 4 to 5": "not give one mark",
    "Final Score: 4, 5": "not give one mark",
    "Final Score: 2 + 3 = 5": "not give one mark",
    "Final Score: 4½": "not give one mark",
    "Final Score: 4th": "not give one mark",
    "Final Score: 4.5.1": "not give one mark",
    "Final Score: 4,125": "not clearly a number",
    "<think>It looks like Final Score: 4": "raise max_tokens",
    "<think>a</think>Final Score: 4 <think>or is Final Score: 5": "raise max_tokens",
    "<think>Final Score: 4</think>": "no verdict",
}


@pytest.mark.parametrize("answer", CLEAR)
def test_a_clear_mark_is_read(answer):
    assert mark(answer) == CLEAR[answer]


@pytest.mark.parametrize("answer", UNCLEAR)
def test_what_is_not_clearly_a_mark_is_none(answer):
    with pytest.raises(Unclear, match=UNCLEAR[answer]):
        mark(answer)


@pytest.mark.parametrize(
    "answer, pattern, value",
    [
        ("beauty=8", r"beauty=(\d+)", 8),
        ("beauty=8/10", r"beauty=(\d+)", 8),
        ("8/10", r"(\S+)/10", 8),
        ("8 stars", r"(\d) stars", 8),
        ("beauty.8", r"beauty.(\d)", 8),
        ("7,5 points", r"(\S+) points", 7.5),
        ("beauty=1 beauty=2", r"beauty=(\d+)", 2),
    ],
)
def test_a_pattern_of_ones_own_finds_the_mark(answer, pattern, value):
    assert mark(answer, pattern, 0, 10) == value


@pytest.mark.parametrize(
    "answer, pattern",
    [
        ("eight/10", r"(\S+)/10"),
        ("beauty=4.5", r"beauty=(\d+)"),
        ("beauty=.5", r"beauty=\W*(\d+)"),
        ("10/10", r"(\d)/10"),
        ("beauty=4/5", r"beauty=(\d+)"),
        ("beauty=", r"beauty=(\d+)?"),
    ],
)
def test_a_pattern_that_finds_a_part_of_the_mark_finds_none(answer, pattern):
    with pytest.raises(Unclear):
        mark(answer, pattern, 0, 10)


def test_a_mark_in_percent_is_one_of_a_hundred():
    assert mark("Final Score: 40%", low=0, high=100) == 40


VERDICTS = {
    "<answer>Image 1 is better</answer>": "1",
    "<answer>Image 2 is better</answer>": "2",
    "<answer>Image 2 is clearly the better image.</answer>": "2",
    "<answer>Image 2 is better than Image 1</answer>": "2",
    "<answer>**Image 1** wins</answer>": "1",
    "<answer> tie </answer>": "tie",
    "<answer>It is a tie.</answer>": "tie",
    "<answer>1</answer>": "1",
    "<answer>Image 1 is better</answer> No: <answer>Tie</answer>": "tie",
    "<think><answer>Image 2 is better</answer></think><answer>Image 1 is better</answer>": "1",
}
NO_VERDICTS = [
    "Image 1 is better",
    "<answer>Image 3 is better</answer>",
    "<answer>Image 1 is worse</answer>",
    "<answer>Image 1 loses</answer>",
    "<answer>Image 1 is not better</answer>",
    "<answer>Image 1 is hardly better</answer>",
    "<answer>Image 1 and Image 2 are equal</answer>",
    "<answer>Image 1 ties with Image 2</answer>",
    "<answer>Image 1 is as good as Image 2</answer>",
    "<answer>1 or 2</answer>",
    "<answer>1 = 2</answer>",
    "<answer>Tie is broken by Image 2</answer>",
    "<answer>Image 1 is better",
    "<answer>Image 1 is better</answer> or rather <answer>Image 1 is worse</answer>",
    "<think>First: <answer>Image 1 is better</answer>? Let me look again at the hands of",
]


@pytest.mark.parametrize("answer", VERDICTS)
def test_a_clear_verdict_is_read(answer):
    won = preference.make("http://a", "m").verdict(answer)
    assert won == {"1": 1, "2": 0, "tie": 0.5}[VERDICTS[answer]]


@pytest.mark.parametrize("answer", NO_VERDICTS)
def test_the_picture_that_is_named_has_not_won_by_that(answer):
    with pytest.raises(Unclear):
        preference.make("http://a", "m").verdict(answer)
