"""Parse a mark or a verdict from the answer of a language model.

Only what is clearly an answer counts. Everything else raises `Unclear`, which says why, so that the
picture gets no score in place of a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# "Final Score: 4", "**Overall score** = 3.5", "final score: **4**/5"
NUMBER = r"[-\u2212]?(?:\d+(?:[.,]\d+)?|[.,]\d+)"
_IS = r"\W{0,4}[:=>\uff1a][\s*_\"'`$(\[{<>\\]{0,6}"
_LABELLED = re.compile(rf"\b(?:final|overall|total)[\s_]score{_IS}({NUMBER})?", re.IGNORECASE)
# "Score: 4" or "<score>4</score>" at the start of a line; not "Alignment score: 5", a part's mark
_BARE = re.compile(rf"^\W*(?:(?:the|my)\s+)?score{_IS}({NUMBER})?", re.IGNORECASE | re.MULTILINE)

_THOUGHT = re.compile(r"[<\[](/?)(?:think|thinking|thought|reasoning)[>\]]", re.IGNORECASE)
_MARKUP = re.compile(r"</\w+>|[*_`\"'()\[\]{}$\\]")
# What a mark must not follow: "1" and "1." of "1.4", the point of ".4"
_GOES_BEFORE = re.compile(r"(?:\d[.,]?|(?<!\w)[.,])$")
# What must not follow a mark: "4-5", "4 or 5", "4, 5", "4 + 1", the rest of a longer number or word
_GOES_ON = re.compile(
    r"[.,]?\d|[^\W_]|[^\S\n]*(?:[-\u2010-\u2015\u2212+\u00b1\u00d7~,\u2192]|->|to\b|or\b|and\b)"
    r"[^\S\n]*\d"
)
_SCALE = re.compile(
    r"[^\S\n]*(?:points?|stars?)?,?[^\S\n]*"
    r"(?:(%|percent)|(?:/|(?:out[^\S\n]+)?of|on a scale (?:of|from)|scale:?)[^\S\n]*"
    rf"(?:\d+[^\S\n]*(?:-|\u2013|to)[^\S\n]*)?({NUMBER}))",
    re.IGNORECASE,
)
# A scale in other words or signs, which is not read: "out of ten", "/ five", "on a 10-point scale"
_OTHER_SCALE = re.compile(
    r"\s*(?:points?|stars?)?,?(?:\s*[/\u2044\u2215\uff0f]|[^\S\n]*(?:out\s+of\b|on\s+an?\b|vs\b"
    r"|of\s+(?:two|three|four|five|six|seven|eight|nine|ten|a\s+hundred|hundred)\b))",
    re.IGNORECASE,
)


class Unclear(ValueError):
    """An answer in which no mark or verdict is clear. The message says why."""


def conclusion(answer: str) -> str:
    """The part of an answer after its reasoning, which <think> and </think> enclose.

    Raises Unclear where the reasoning does not end.
    """
    tags = list(_THOUGHT.finditer(answer))
    if not tags:
        return answer
    if not tags[-1][1]:
        raise Unclear(
            f"the reasoning of the answer does not end: {answer[-100:]!r}. It may have been cut"
            " off: raise max_tokens"
        )
    return answer[tags[-1].end() :]


def mark(answer: str, pattern: re.Pattern[str] | None, low: float, high: float) -> float:
    """The mark, from `low` to `high`, in which an answer ends.

    Args:
      pattern: has one group, the mark; its last match counts. None: the last number after "Final
        Score:" counts, or after "Score:" at the start of a line if there is one such line alone.

    Raises Unclear where there is no mark, a range or a part of a number, a mark on a scale that
    does not end at `high` ("8/10" of 5), or one outside `low` to `high`.
    """
    text = conclusion(answer)
    found = _last(text, [pattern] if pattern else [_LABELLED, _BARE])
    before, after = text[: found.start(1)], _MARKUP.sub("", text[found.end() : found.end() + 80])
    shown = text[max(found.start(), found.start(1) - 40) : found.end() + 20]
    scale = _SCALE.match(after)
    if scale:
        best = 100.0 if scale[1] else number(scale[2])
        if best != high:
            raise Unclear(f"the mark in {shown!r} is on a scale to {best:g}, not to {high:g}")
    elif _OTHER_SCALE.match(after):
        raise Unclear(f"the scale of the mark in {shown!r} is not clear: it must end in /{high:g}")
    elif _GOES_ON.match(after) or (found[1][0].isdigit() and _GOES_BEFORE.search(before)):
        raise Unclear(f"{shown!r} does not give one mark")
    value = number(found[1])
    if not low <= value <= high:
        raise Unclear(f"the mark in {shown!r} is not from {low:g} to {high:g}")
    return value


def number(text: str) -> float:
    """Parse a number, whose decimal sign may be a comma. Raises Unclear for any other text.

    A comma before three digits may separate thousands as well: this is not clear either.
    """
    if not re.fullmatch(NUMBER, text) or re.search(r",\d{3}$", text):
        raise Unclear(f"{text!r} is not clearly a number")
    return float(text.replace(",", ".").replace("\u2212", "-"))


def verdict(answer: str, pattern: re.Pattern[str]) -> str:
    """Return the one group of the pattern's last match. Raises Unclear where nothing matches."""
    return _last(conclusion(answer), [pattern])[1]


def _last(text: str, patterns: Sequence[re.Pattern[str]]) -> re.Match[str]:
    """The last match of the first pattern that matches at all.

    Raises Unclear where none does, and where `_BARE` matches several times.
    """
    for pattern in patterns:
        found = list(pattern.finditer(text))
        if pattern is _BARE and len(found) > 1:
            raise Unclear(f"the answer has {len(found)} scores, none of them final: {text!r}")
        if found and not found[-1][1]:
            raise Unclear(f"no verdict in {text[found[-1].start() :][:200]!r}")
        if found:
            return found[-1]
    raise Unclear(f"no verdict in the answer {text[-200:]!r}")
