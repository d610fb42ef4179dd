"""The tables and the figure of the league, from the results of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, Any]
Runs = dict[tuple[str, int], list[Result]]  # the seeds of a row, by its name and its images
CURVES = 6  # rows whose curves are drawn
STRICT = "held_out", "shapes_strict"


def strict(result: Result) -> float:
    """The share of held-out pictures that are exactly as asked."""
    return result["held_out"]["shapes_strict"]


def ranked(results: list[Result]) -> list[tuple[tuple[str, int], list[Result]]]:
    """The runs of each row and number of images, best mean first."""
    groups: Runs = {}
    for result in results:
        groups.setdefault((result["row"], result["images"]), []).append(result)
    return sorted(groups.items(), key=lambda item: -mean(item[1], *STRICT))


def mean(runs: list[Result], *keys: str) -> float:
    """The mean over runs of what stands under keys within keys."""
    values: list[Any] = list(runs)
    for key in keys:
        values = [value[key] for value in values]
    return float(np.mean(values))


def table(results: list[Result]) -> str:
    """A line a row of the league, best first: means over its seeds, and the deviation of two."""
    lines = [
        "| row | seeds | images | held out, strict | prompts of training | graded |"
        " unrecognisable | difference | colours, bits | loss on true pictures | minutes |"
        " forwards an image |",
        "|" + "---|" * 12,
    ]
    for (row, images), runs in ranked(results):
        spread = f" ± {np.std([strict(r) for r in runs], ddof=1):.3f}" if len(runs) > 1 else ""
        seen = mean(runs, "trained_prompts", "shapes_strict")
        graded, unknown = (mean(runs, "held_out", f"shapes{end}") for end in ("", "_unknown"))
        others = ("difference", "colour_entropy", "true_loss", "minutes", "forwards")
        means = [mean(runs, name) for name in others]
        lines.append(
            f"| {row} | {len(runs)} | {images} | {mean(runs, *STRICT):.3f}{spread} | {seen:.3f} |"
            f" {graded:.3f} | {unknown:.3f} | {means[0]:.1f} | {means[1]:.2f} | {means[2]:.3f} |"
            f" {means[3]:.1f} | {means[4]:.0f} |"
        )
    return "\n".join(lines)


def by_tag(results: list[Result]) -> str:
    """Held-out strict accuracy of each tag, a line a row of the league, best first."""
    tags = sorted({tag for result in results for tag in result["per_tag"]})
    lines = ["| row | images | " + " | ".join(tags) + " |", "|" + "---|" * (len(tags) + 2)]
    for (row, images), runs in ranked(results):
        cells = [f"{mean(runs, 'per_tag', tag):.2f}" for tag in tags]
        lines.append(f"| {row} | {images} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: list[Result], images: int, file: Path) -> None:
    """Left the rows with so many images, best first, each seed a point; right the curves of the
    best ones, of all numbers of images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(row, runs) for (row, n), runs in ranked(results) if n == images]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, max(4.0, 0.24 * len(rows) + 1)), gridspec_kw={"width_ratios": [1, 1.3]}
    )
    best = [row for row, _ in rows[:CURVES]]
    colours = {row: f"C{i}" for i, row in enumerate(best)}
    for i, (row, runs) in enumerate(rows):
        colour = colours.get(row, "0.5")
        left.plot([strict(r) for r in runs], [i] * len(runs), "o", color=colour, alpha=0.6)
        left.plot(mean(runs, *STRICT), i, "|", color=colour, markersize=14)
    base = [value for r in results for count, value in r["curve"] if not count]
    left.axvline(np.mean(base), color="0.7", linestyle=":", label="before training")
    left.set_yticks(range(len(rows)), [row for row, _ in rows])
    left.invert_yaxis()
    left.set(xlabel="held-out prompts, strict accuracy", title=f"{images:,} images of training")
    left.legend(fontsize=8)
    for result in results:
        if result["row"] in colours:
            right.plot(*zip(*result["curve"]), marker=".", color=colours[result["row"]])
    for row in best:
        right.plot([], [], color=colours[row], label=row)
    right.set(xlabel="images of training", title="the best rows")
    right.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
