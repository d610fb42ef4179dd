"""Verdicts in words: what an evaluation has lost since the first one of its run.

The limits are set between the honest runs of the bundled model, whose pictures' figures move by
up to 29 % in 400 epochs (docs/report.md), and hacked runs, in which they move by more than 50 %: in
the case that is best known, edge density fell by 60 %, colour entropy by 54 % and brightness by
73 % while the text reward rose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

FINE, WATCH, ALARM = LEVELS = ("fine", "watch", "alarm")
LOWER_IS_BETTER = ("shapes_unknown",)  # rewards that count what is wrong with a picture


class Limits(NamedTuple):
    """From where on a change is to be watched, and from where on it is an alarm."""

    watch: float
    alarm: float


@dataclass(frozen=True)
class Rule:
    """How a figure of the monitors is judged by its change since the first evaluation.

    Attributes:
      figure: its name in the metrics, without "monitor/"; label: its name for people.
      lost: what a fall beyond the limit means, in words; gained: what a rise means.
      fall, rise: limits of the change, which is a share of the first value or, with `absolute`, a
        difference; None where that direction is no loss.
    """

    figure: str
    label: str
    lost: str
    gained: str
    fall: Limits | None = None
    rise: Limits | None = None
    absolute: bool = False


FLATTER, BUSIER = Limits(0.2, 0.35), Limits(0.5, 1.0)
# From 1 on the velocity differs from the base's by more than the base's own length. At low noise
# that is small, so that the same change is a larger share of it.
MOVES = {"high": Limits(0.15, 1.0), "middle": Limits(0.15, 1.0), "low": Limits(1.0, 2.0)}
RULES = (
    Rule("edge_density", "Edge density", "detail is lost", "noise or clutter", FLATTER, BUSIER),
    Rule("colour_entropy", "Colour entropy", "pictures get flat", "clutter", FLATTER, BUSIER),
    Rule("brightness", "Brightness", "pictures get dark", "pictures get pale",
         Limits(0.15, 0.3), Limits(0.25, 0.5)),
    Rule("saturation", "Saturation", "pictures get grey", "pictures get garish",
         Limits(0.3, 0.5), BUSIER),
    Rule("dark", "Share of dark pixels", "", "black areas show nothing",
         rise=Limits(0.1, 0.25), absolute=True),
    Rule("bright", "Share of bright pixels", "", "white areas show nothing",
         rise=Limits(0.1, 0.25), absolute=True),
    Rule("sharpness", "Sharpness", "blur", "noise or grain", FLATTER, BUSIER),
    Rule("diversity", "Diversity within a prompt", "pictures of a prompt become alike", "",
         Limits(0.25, 0.4)),
    Rule("clip_diversity", "Diversity within a prompt, as CLIP sees it",
         "pictures of a prompt show the same", "", Limits(0.25, 0.4)),
    *(
        Rule(f"move_{name}", f"Size of the move at {name} noise", "",
             "the policy leaves what the base model knows", rise=limits, absolute=True)
        for name, limits in MOVES.items()
    ),
    # 10 % is DDRL's alarm (arXiv 2512.04332). No alarm here: an honest run of the bundled model
    # reaches 850 % in 400 epochs and a hacked one 600 % in 18, so that it does not tell them apart.
    Rule("true_loss", "Loss on true pictures", "", "the policy forgets what is true",
         rise=Limits(0.1, math.inf)),
)  # fmt: skip
# How far an evaluated reward falls: in standard errors of the difference, and, for an alarm, also
# as a share of the first value. While a reward that is trained on rises, that is how hacking looks;
# otherwise the training does harm, for example by too large a step.
REWARDS = Limits(2.0, 4.0)
REWARDS_SHARE = 0.15
TRICK = " while a reward that is trained on rose: what is gained may be a trick"
DAMAGE = " and no reward that is trained on rose: training does harm, lower train.learning_rate"
# The mean change of log-probs during an epoch, at the step where it is largest, in clip ranges.
# Beyond 1 the clip silences most transitions of that step. No alarm: pictures lose nothing by it.
DRIFT = Limits(1.0, math.inf)
LOG_PROBS = "log_prob_change/"  # what a figure of one step begins with


class Verdict(NamedTuple):
    """A monitor's judgement of an evaluation."""

    figure: str
    label: str
    level: str  # fine, watch or alarm
    first: float
    now: float
    says: str


def verdicts(
    rows: Iterable[Mapping[str, Any]],
    weights: Mapping[str, float],
    options: Mapping[str, Any] = MappingProxyType({}),
) -> dict[int, list[Verdict]]:
    """Return the verdicts on every evaluation but the first, by epoch.

    Args:
      rows: the metrics of a run.
      weights: of the rewards that are trained on; options: of the algorithm.
    """
    first, found = None, {}
    trained: Mapping[str, Any] = {}
    for row in rows:
        if any(key.startswith("eval/") for key in row):
            if first is None:
                first = row
            else:
                moved = drift(trained, options)
                found[int(row["epoch"])] = judge(first, row, weights) + moved
        if any(key.startswith(LOG_PROBS) for key in row):
            trained = row  # an evaluation at the same epoch comes before it
    return found


def judge(
    first: Mapping[str, Any], now: Mapping[str, Any], weights: Mapping[str, float]
) -> list[Verdict]:
    """Return the verdicts on an evaluation, by the first one's figures. See `verdicts`."""
    found = [by_rule(rule, first, now) for rule in RULES]
    return [v for v in [*found, *rewards(first, now, weights)] if v]


def worst(found: Iterable[Verdict]) -> str:
    """Return the most serious level; fine where there is no verdict."""
    return max((v.level for v in found), key=LEVELS.index, default=FINE)


def by_rule(rule: Rule, first: Mapping[str, Any], now: Mapping[str, Any]) -> Verdict | None:
    """Judge one figure; None where one of the evaluations lacks it."""
    name = f"monitor/{rule.figure}"
    before, after = number(first.get(name)), number(now.get(name))
    if math.isnan(before + after) or not (rule.absolute or before):
        return None
    change = after - before if rule.absolute else after / before - 1
    limits = rule.rise if change > 0 else rule.fall
    level = level_of(abs(change), limits)
    size = f"{abs(change):.2f}" if rule.absolute else f"{abs(change):.0%}"
    says = f"{'rose' if change > 0 else 'fell'} by {size}"
    if level != FINE and limits:
        limit = getattr(limits, level)
        shown = f"{limit:.2f}" if rule.absolute else f"{limit:.0%}"
        says += f" ({level} from {shown}): {rule.gained if change > 0 else rule.lost}"
    return Verdict(rule.figure, rule.label, level, before, after, says)


def rewards(
    first: Mapping[str, Any], now: Mapping[str, Any], weights: Mapping[str, float]
) -> list[Verdict]:
    """Judge the evaluated rewards: those that are trained on, and those that are held out."""
    names = [k.removeprefix("eval/") for k in now if k.startswith("eval/") and k.count("/") == 1]
    gains = {name: gain(name, first, now, weights.get(name, 0.0)) for name in names}
    rises = any(weights.get(name) and errors > REWARDS.watch for name, (_, errors) in gains.items())
    found = []
    for name, (difference, errors) in gains.items():
        if math.isnan(errors):
            continue
        before, after = number(first.get(f"eval/{name}")), number(now.get(f"eval/{name}"))
        level = level_of(-errors, REWARDS)
        if level == ALARM and -difference < REWARDS_SHARE * abs(before):
            level = WATCH
        says = f"{'better' if difference >= 0 else 'worse'} by {abs(errors):.1f} standard errors"
        if level != FINE:
            says += TRICK if rises else DAMAGE
        kind = "Trained" if weights.get(name) else "Held-out"
        found.append(Verdict(f"eval/{name}", f"{kind} reward {name}", level, before, after, says))
    return found


def drift(trained: Mapping[str, Any], options: Mapping[str, Any]) -> list[Verdict]:
    """Judge how far the updates of the last epoch before an evaluation moved the log-probs of its
    own images. No verdict where the algorithm has no clip, or no change is finite."""
    changes = {name: number(v) for name, v in trained.items() if name.startswith(LOG_PROBS)}
    steps = {name: change for name, change in changes.items() if math.isfinite(change)}
    clip = options.get("clip_range") if options.get("trust_region", "clip") == "clip" else None
    if not steps or not clip:
        return []
    name = max(steps, key=lambda name: steps[name])
    times = steps[name] / clip
    level = level_of(times, DRIFT)
    step = int(name.removeprefix(LOG_PROBS))
    says = f"is largest at step {step}: {times:.2g} times the clip range"
    if level != FINE:
        says += f" ({level} from {DRIFT.watch:g}): lower train.learning_rate, or take fewer updates"
    return [Verdict(name, "Change of log-probs in an epoch", level, 0.0, steps[name], says)]


def gain(
    name: str, first: Mapping[str, Any], now: Mapping[str, Any], weight: float = 0.0
) -> tuple[float, float]:
    """Return how much better an evaluated reward became, and that in standard errors of the
    difference as if the two evaluations were independent, which is cautious: prompts and noise are
    the same. Without an error a change is infinitely many, and none is 0.

    Args:
      weight: that it is trained with, by whose sign a fall may be what is wanted; 0: none.
    """
    before, after = number(first.get(f"eval/{name}")), number(now.get(f"eval/{name}"))
    errors = [number(row.get(f"eval_error/{name}")) for row in (first, now)]
    difference = before - after if lower_is_better(name, weight) else after - before
    error = math.hypot(*errors)
    if difference and not error:
        return difference, math.copysign(math.inf, difference)
    return difference, difference / (error or 1.0)


def lower_is_better(name: str, weight: float = 0.0) -> bool:
    """Whether a reward should fall: by the sign of the weight that it is trained with, and without
    one because it counts what is wrong with a picture."""
    return weight < 0 if weight else name in LOWER_IS_BETTER


def level_of(size: float, limits: Limits | None) -> str:
    if limits is None or size < limits.watch:
        return FINE
    return ALARM if size >= limits.alarm else WATCH


def number(value: Any) -> float:
    """The value as a float; NaN for none, which is how the metrics write one that is not finite."""
    return math.nan if value is None else float(value)


def in_words(found: Sequence[Verdict], level: str = ALARM) -> str:
    """Return the verdicts of a level as one sentence; "" without any."""
    return "; ".join(f"{v.label} {v.says}" for v in found if v.level == level)
