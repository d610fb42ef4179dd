"""The GenEval rule: score a picture's detections against a prompt's metadata.

Nothing here looks at pixels. A detector (Mask2Former for GenEval proper, a template matcher
for the shapes world) hands over `Detection`s that passed its own confidence threshold; the
metadata say what should be there:

    {"tag", "prompt", "include": [{"class", "count", "color"?, "position"?: [relation, index]}],
     "exclude"?: [{"class", "count"}]}

`position` relates the clause's objects to those of the include clause number `index`.

Sources: djghosh13/geneval `evaluation/evaluate_images.py` (relation, `correct`) and
yifan123/reward-server `gen_eval.py` (`graded`, `strict`). Deviations, each with a switch back
or no effect on GenEval's own prompts:

1. A wrong relation earns its clause 0. Upstream appends a 1 after that 0, so that a picture
   with both objects in the wrong places gets 3/4 instead of 2/3 (`upstream_position_bug`).
2. A count's reward is clamped at 0: five dogs for one asked earn 0, not -3 (`clamp_counts`).
3. `closed_world` (off): things of a class that the prompt does not name make the picture not
   strict and scale `graded` by asked / (asked + unasked). A factor, not a clause: a clause
   would pay for leaving the picture empty, or for adding clutter to a bad one.
4. An include clause without a count, or without any clause at all, is an error.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RELATIONS = ("left of", "right of", "above", "below")
OFFSET_SLACK = 0.1  # share of the two boxes' summed sizes that an offset must exceed to count
DIRECTION = 0.5  # least component of the slackened offset, in lengths of the full offset


class Detection(NamedTuple):
    """One detected object: class name, confidence, box (x0, y0, x1, y1) in px with y down,
    and colour name (None if not classified)."""

    cls: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None


class Score(NamedTuple):
    """`graded`: mean clause reward, the training reward, at most 1. `strict`: every clause
    holds exactly, `exclude` ignored. `correct`: GenEval's official verdict, at least the
    counts asked for among the most confident boxes, `exclude` respected."""

    graded: float
    strict: bool
    correct: bool


def relations(a: Detection, b: Detection) -> set[str]:
    """Return at most two relations of `a` to `b`: "left of", "right of", "above", "below"."""
    box_a, box_b = (np.reshape(d.box, (2, 2)) for d in (a, b))
    offset = box_a.mean(0) - box_b.mean(0)
    slack = OFFSET_SLACK * (np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0]))
    clear = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0.0)
    if np.all(np.abs(clear) < 1e-3):
        return set()
    dx, dy = clear / np.linalg.norm(offset)
    sides = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {name for name, component in sides.items() if component > DIRECTION}


def score(
    detections: Sequence[Detection],
    metadata: dict,
    *,
    closed_world: bool = False,
    clamp_counts: bool = True,
    upstream_position_bug: bool = False,
) -> Score:
    """Score one picture. The switches are explained at the top of the module.

    Raises ValueError if the metadata ask for nothing.
    """
    include = metadata["include"]
    if not include or any(clause["count"] < 1 for clause in include):
        raise ValueError(f"each include clause must ask for at least one object, got {include!r}")
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        found.setdefault(detection.cls, []).append(detection)

    graded, strict = _graded(found, include, clamp_counts, upstream_position_bug)
    if closed_world:
        asked = {clause["class"] for clause in include}
        unasked = sum(len(things) for cls, things in found.items() if cls not in asked)
        wanted = sum(clause["count"] for clause in include)
        graded *= wanted / (wanted + unasked)
        strict = strict and unasked == 0
    return Score(graded, strict, _correct(found, metadata))


def _graded(found, include, clamp_counts, position_bug) -> tuple[float, bool]:
    """Mean clause reward, and whether every clause holds."""

    def share(asked, got):
        reward = 1.0 - abs(asked - got) / asked
        return max(reward, 0.0) if clamp_counts else reward

    rewards: list[float] = []
    matched: list[list[Detection] | None] = []
    for clause in include:
        asked, things = clause["count"], found.get(clause["class"], [])
        rewards.append(share(asked, len(things)))
        holds = len(things) == asked
        if not holds and ("color" in clause or "position" in clause):
            rewards.append(0.0)
        if holds and "color" in clause:
            painted = sum(thing.color == clause["color"] for thing in things)
            rewards.append(share(asked, painted))
            holds = painted == asked
        if holds and "position" in clause:
            holds = _placed(things, clause["position"], matched)
            rewards.append(float(holds))
            if position_bug and not holds and matched[clause["position"][1]] is not None:
                rewards.append(1.0)
        matched.append(things if holds else None)
    return float(np.mean(rewards)), None not in matched


def _correct(found, metadata) -> bool:
    """GenEval's own verdict: looks only at the `count` most confident boxes of each class."""
    matched: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        things = found.get(clause["class"], [])[: clause["count"]]
        holds = len(things) == clause["count"]
        if holds and "color" in clause:
            holds = all(thing.color == clause["color"] for thing in things)
        if holds and "position" in clause:
            holds = _placed(things, clause["position"], matched)
        matched.append(things if holds else None)
    excluded = any(
        len(found.get(clause["class"], [])) >= clause["count"]
        for clause in metadata.get("exclude", [])
    )
    return None not in matched and not excluded


def _placed(things, position, matched) -> bool:
    """Return whether every thing stands in the relation to every object of the (matched) target."""
    relation, target = position
    if matched[target] is None:
        return False
    return all(relation in relations(thing, other) for thing in things for other in matched[target])


def check(
    metadata: Mapping[str, Any],
    *,
    classes: Collection[str],
    counts: Collection[int],
    colors: Collection[str],
) -> None:
    """Raise ValueError for metadata that `score` cannot judge with these classes and colours.

    That includes a class, count or colour that no detection can have. The error names the value.
    """
    if not metadata.get("include"):
        raise ValueError(
            f"metadata {metadata!r} are not GenEval's: they need `include` with at least one"
            " {class, count}. Take prompts from a GenEval metadata file (.jsonl)"
        )
    clauses = [*_clauses(metadata, "include"), *_clauses(metadata, "exclude")]
    choices: dict[str, Collection[Any]] = {"class": classes, "count": counts, "color": colors}
    for place, clause in enumerate(clauses):
        for key, allowed in choices.items():
            value = clause.get(key)
            # 2.0 equals 2, but no list can be cut at 2.0.
            if (key != "color" or key in clause) and (
                isinstance(value, float) or value not in allowed
            ):
                raise ValueError(f"GenEval clause {clause!r}: {key} must be one of {allowed}")
        if "position" in clause and not _is_position(clause["position"], place):
            raise ValueError(
                f"GenEval clause {clause!r}: position must be one of {RELATIONS} and the number of"
                " an earlier include clause"
            )


def _clauses(metadata: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    clauses = metadata.get(key, [])
    if not isinstance(clauses, list) or not all(isinstance(c, Mapping) for c in clauses):
        raise ValueError(f"GenEval metadata {key}={clauses!r}: must be a list of {{class, count}}")
    return clauses


def _is_position(value: Any, place: int) -> bool:
    """Return whether `value` is a relation and the number of a clause before `place`."""
    pair = isinstance(value, list | tuple) and len(value) == 2
    return pair and value[0] in RELATIONS and value[1] in range(place) and type(value[1]) is int
