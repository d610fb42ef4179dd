"""Which accelerator trains what: the memory of SD3.5 with LoRA, by the compiler for TPUs alone.

    python -m benchmarks.memory --out benchmarks/results/memory.json [--only medium,v5e]

Compiles the two largest programs of configs/geneval.py:single_gpu (512 px, no guidance, 3 of 10
steps trained, prompts encoded ahead), `sample` and `accumulate`, for one chip of each row of
`ROWS`, and prints two tables in Markdown: what fits a chip, and what is derived from it for cards
by the size of their memory. Rows that are in the file already are not compiled again. Takes
minutes a row; needs `pip install -e '.[tpu,int8]'`, no TPU and no weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pods import LARGE, MEDIUM, compiled

RECIPE, PROGRAMS = "geneval:single_gpu", ("sample", "accumulate")
TOPOLOGIES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:1x1x1"}
MODELS = {"medium": MEDIUM, "large": LARGE}
CARDS = (16, 24, 40, 80, 141)  # GB
USABLE = 0.9  # of a card: XLA_PYTHON_CLIENT_MEM_FRACTION, the rest is CUDA's


class Row(NamedTuple):
    """One compilation: a model, the storage of its base, images at once, on a chip."""

    chip: str
    model: str
    base_dtype: str
    micro: int
    remat: bool = True

    def __str__(self) -> str:
        words = (self.chip, self.model, self.base_dtype or "bfloat16", f"micro {self.micro}")
        return " ".join(words) + ("" if self.remat else " no remat")

    def flags(self) -> list[str]:
        return [
            f"--config.model.path={MODELS[self.model]}",
            f"--config.model.base_dtype={self.base_dtype}",
            f"--config.model.remat={self.remat}",
            "--config.model.text_cache=texts",
            f"--config.sample.micro_batch={self.micro}",
        ]


# v5p has room for all of them: two sizes of micro-batch there say what an image takes. The others
# are what is to fit.
ROWS = (
    Row("v5p", "medium", "int8", 4),
    Row("v5e", "medium", "int8", 4),
    Row("v5p", "medium", "int8", 16),
    Row("v5p", "medium", "", 4),
    Row("v5p", "large", "int8", 4),
    Row("v5p", "medium", "", 16),
    Row("v5p", "large", "", 4),
    Row("v5p", "large", "int8", 16),
    Row("v5e", "medium", "", 4),
    Row("v5p", "medium", "int8", 4, remat=False),
    Row("v5p", "large", "", 16),
    Row("v6e", "medium", "int8", 16),
    Row("v6e", "large", "int8", 4),
    Row("v5e", "large", "int8", 4),
)


HEADER = [
    "chip",
    "model",
    "base",
    "remat",
    "images at once",
    "GB always there",
    "GB in sample",
    "GB in accumulate",
    "it fits",
    "s of sample",
    "s of accumulate",
]


def largest(report: dict[str, Any]) -> float:
    """The bytes of the program that needs most."""
    return max(p["memory"] for p in report["programs"])


def by_chip(reports: dict[str, Any]) -> list[list[str]]:
    """A line for each row: GB always there, of each program, and seconds of a call at least."""
    lines = [HEADER]
    for row in sorted(ROWS, key=lambda r: (list(TOPOLOGIES).index(r.chip), r.model != "medium")):
        if str(row) not in reports:
            continue
        report = reports[str(row)]
        if "programs" not in report:
            lines.append([*row[:3], "", f"{row.micro}", report["verdict"], *[""] * 5])
            continue
        found = {p["program"]: p for p in report["programs"]}
        needs = [found[name]["memory"] / 1e9 for name in PROGRAMS]
        seconds = ["" if found[n]["error"] else f"{found[n]['seconds']:.2f}" for n in PROGRAMS]
        fits = "yes" if report["verdict"] == "it fits" else "no"
        lines.append(
            [
                row.chip,
                row.model,
                row.base_dtype or "bfloat16",
                "yes" if row.remat else "no",
                f"{row.micro}",
                f"{report['resident'] / 1e9:.1f}",
                *(f"{x:.1f}" for x in needs),
                fits,
                *seconds,
            ]
        )
    return lines


def by_card(reports: dict[str, Any]) -> list[list[str]]:
    """The largest micro-batch of each model by the size of a card: a line through two sizes."""
    lines = [["model", "base", "GB without images", "GB an image", *(f"{n} GB" for n in CARDS)]]
    for model in MODELS:
        for base_dtype in ("", "int8"):
            pair = [str(Row("v5p", model, base_dtype, micro)) for micro in (4, 16)]
            if not all("programs" in reports.get(name, {}) for name in pair):
                continue
            few, many = (largest(reports[name]) / 1e9 for name in pair)
            image = (many - few) / 12
            start = few - 4 * image
            most = [int((USABLE * n - start) / image) for n in CARDS]
            cells = [f"{m}" if m > 0 else "no" for m in most]
            lines.append([model, base_dtype or "bfloat16", f"{start:.1f}", f"{image:.2f}", *cells])
    return lines


def markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="file of all reports")
    parser.add_argument("--only", default="", help="rows that contain one of these, by comma")
    args = parser.parse_args()
    reports = json.loads(args.out.read_text()) if args.out.exists() else {}
    for row in ROWS:
        name = str(row)
        if name not in reports and any(part in name for part in args.only.split(",")):
            report = compiled(RECIPE, TOPOLOGIES[row.chip], row.flags(), PROGRAMS)
            reports[name] = {k: v for k, v in report.items() if k != "config"}
            args.out.write_text(json.dumps(reports, indent=1) + "\n")
            print(name, report["verdict"], flush=True)
    print(markdown(by_chip(reports)), markdown(by_card(reports)), sep="\n\n")


if __name__ == "__main__":
    main()
