"""What papers claim about the settings of GRPO, as variants of its row in the league.

`python -m benchmarks.league --rows CLAIMS` trains them, as rows "grpo+VARIANT", and
`python -m benchmarks.league --claims` prints the table with a verdict on each claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

STRICT = "shapes_strict"
PLAIN = "grpo"  # the recipe as it is: 20 steps, groups of 12, noise 0.6, graded reward, no KL


class Claim(NamedTuple):
    """That one variant is better than another, or as good, on held-out prompts."""

    text: str
    better: str
    other: str
    equal: bool = False  # that they do not differ


def steps(count: int) -> dict[str, Any]:
    """A rollout of fewer steps, whose window lies at the same noise levels."""
    low, high = round(3 / 20 * count), max(round(10 / 20 * count), round(3 / 20 * count) + 3)
    return {"sample.steps": count, "sample.window_range": (low, high)}


def group(size: int) -> dict[str, Any]:
    """Groups of another size, and as many images an epoch."""
    return {"sample.group_size": size, "sample.groups": 288 // size}


# {variant: the settings that it changes}
VARIANTS: dict[str, Mapping[str, Any]] = {
    **{f"steps-{n}": steps(n) for n in (5, 10)},
    **{f"group-{n}": group(n) for n in (6, 24)},
    **{f"noise-{n}": {"sample.noise_level": n / 10} for n in (3, 7, 9)},
    "same-noise": {"sample.branches": 0},
    "batch": {"advantage.name": "batch"},
    "per-prompt": {"advantage.name": "per_prompt"},
    "strict": {"reward.weights": {STRICT: 1.0}},
    "hacked": {"reward.weights": {"jpeg_compressibility": 1.0}},
    "held": {
        "reward.weights": {"jpeg_compressibility": 1.0},
        "algorithm.options.kl_beta": 1.0,
    },
}

CLAIMS = (
    Claim("10 steps in training are as good as 20 (Flow-GRPO)", "steps-10", "", equal=True),
    Claim("5 steps are worse than 10 (Flow-GRPO)", "steps-10", "steps-5"),
    Claim("larger groups are better: 24 against 12 (Flow-GRPO)", "group-24", ""),
    Claim("and 12 against 6", "", "group-6"),
    Claim("more noise explores more: 0.7 against 0.3 (Flow-GRPO)", "noise-7", "noise-3"),
    Claim("too much harms: 0.7 against 0.9 (Flow-GRPO)", "noise-7", "noise-9"),
    Claim("a KL holds what a reward that can be tricked destroys", "held", "hacked"),
    Claim("the same first noise in a group is better (DanceGRPO)", "same-noise", ""),
    Claim("normalising over the batch is better than by group (Pinterest)", "batch", ""),
    Claim("and better than by prompt over time (Pinterest against DDPO)", "batch", "per-prompt"),
    Claim("a graded reward is better than a strict one", "", "strict"),
)


def row(variant: str) -> str:
    return f"{PLAIN}+{variant}" if variant else PLAIN


def rows() -> list[str]:
    """The rows of all variants, with the recipe as it is."""
    return [PLAIN, *map(row, VARIANTS)]


def apply(config: Any, variant: str) -> None:
    """Change the settings of a recipe to those of a variant.

    Raises KeyError for one that there is not.
    """
    for knob, value in VARIANTS[variant].items():
        section, _, key = knob.rpartition(".")
        part = config
        for name in section.split("."):
            part = part[name]
        part[key] = type(part[key])(value) if isinstance(value, Mapping) else value


def table(results: list[dict[str, Any]]) -> str:
    """A line a claim, with what was measured and a verdict."""
    lines = ["| claim | measured | difference | verdict |", "|---|---|---|---|"]
    between_seeds = _variance_between_seeds(results)
    for claim in CLAIMS:
        sides = [[r for r in results if r["row"] == row(v)] for v in (claim.better, claim.other)]
        if not all(sides):
            lines.append(f"| {claim.text} | | | not run |")
            continue
        values = [[r["held_out"][STRICT] for r in side] for side in sides]
        means = [float(np.mean(v)) for v in values]
        gap, error = means[0] - means[1], _error(sides, between_seeds)
        verdict, measured = _verdict(claim, gap, error), f"{means[0]:.3f} against {means[1]:.3f}"
        lines.append(f"| {claim.text} | {measured} | {gap:+.3f} ± {error:.3f} | {verdict} |")
    return "\n".join(lines)


def _variance_between_seeds(results: list[dict[str, Any]]) -> float:
    """Return the variance of one run's accuracy, pooled over all rows with several seeds.

    Two seeds of one row say hardly anything about it; those of many rows do.
    """
    by_row: dict[str, list[float]] = {}
    for r in results:
        by_row.setdefault(r["row"], []).append(r["held_out"][STRICT])
    several = [values for values in by_row.values() if len(values) > 1]
    squares = sum(float(np.var(values)) * len(values) for values in several)
    return squares / max(sum(len(values) - 1 for values in several), 1)


def _error(sides: list[list[dict[str, Any]]], between_seeds: float) -> float:
    """Return the standard error of the difference of two means over seeds.

    It is the larger one of what seeds leave and of what counting so many pictures leaves.
    """
    counted = sum(
        p * (1 - p) / r["evaluated"] / len(side) ** 2
        for side in sides
        for r in side
        for p in [r["held_out"][STRICT]]
    )
    return math.sqrt(max(counted, sum(between_seeds / len(side) for side in sides)))


def _verdict(claim: Claim, gap: float, error: float) -> str:
    if abs(gap) < 2 * error:
        return "yes, within the noise" if claim.equal else "within the noise"
    if claim.equal:
        return "no: better" if gap > 0 else "no: worse"
    return "yes" if gap > 0 else "no, the opposite"
