"""Which accelerator trains what: the memory of SD3.5 with LoRA, by the compiler for TPUs alone.

    python -m benchmarks.memory --out benchmarks/results/memory.json [--only medium,v5e]

Compiles the two largest programs of configs/geneval.py:single_gpu (512 px, no guidance, 3 of 10
steps trained, prompts encoded ahead), `sample` and `accumulate`, for one chip of each row of
`ROWS`, and prints two tables in Markdown: what fits a chip, and what is derived from it for cards
by the size of their memory. Rows that are in the file already are not compiled again. Takes
minutes a row; needs `pip install -e '.[tpu,int8]'`, no TPU and no weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import markdown
from benchmarks.pods import LARGE, MEDIUM, collect, compiled
from flowgrpo_jax.models import sd3
from flowgrpo_jax.models.lora import LoRASpec

RECIPE, PROGRAMS = "geneval:single_gpu", ("sample", "accumulate")
TOPOLOGIES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:1x1x1"}
MODELS = {"medium": MEDIUM, "large": LARGE}
CARDS = (16, 24, 40, 80, 141)  # GB
DIVISORS = [n for n in range(1, 577) if 576 % n == 0]  # of the images of an update
USABLE = 0.9  # of a card: XLA_PYTHON_CLIENT_MEM_FRACTION, the rest is CUDA's


class Row(NamedTuple):
    """One compilation: a model, the storage of its base, images at once, on a chip."""

    chip: str
    model: str
    base_dtype: str
    micro: int

    def __str__(self) -> str:
        words = (self.chip, self.model, self.base_dtype or "bfloat16", f"micro {self.micro}")
        return " ".join(words)

    def flags(self) -> list[str]:
        return [
            f"--config.model.path={MODELS[self.model]}",
            f"--config.model.base_dtype={self.base_dtype}",
            "--config.model.text_cache=texts",
            f"--config.sample.micro_batch={self.micro}",
        ]


# The first row of a model and base is the one that `by_card` reads.
ROWS = (
    Row("v5e", "medium", "int8", 4),
    Row("v5e", "medium", "", 4),
    Row("v5p", "large", "int8", 4),
    Row("v5p", "large", "", 4),
    Row("v6e", "medium", "int8", 16),
    Row("v5p", "medium", "int8", 16),
)


HEADER = [
    "chip",
    "model",
    "base",
    "images at once",
    "GB always there",
    "GB in sample",
    "GB in accumulate",
    "it fits",
    "s of sample",
    "s of accumulate",
]


def by_chip(reports: dict[str, Any]) -> list[list[str]]:
    """A line for each row: GB always there, of each program, and seconds of a call at least."""
    lines = [HEADER]
    for row in sorted(ROWS, key=lambda r: (list(TOPOLOGIES).index(r.chip), r.model != "medium")):
        if str(row) not in reports:
            continue
        report = reports[str(row)]
        if "programs" not in report:
            lines.append([*row[:3], f"{row.micro}", report["verdict"], *[""] * 5])
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
                f"{row.micro}",
                f"{report['resident'] / 1e9:.1f}",
                *(f"{x:.1f}" for x in needs),
                fits,
                *seconds,
            ]
        )
    return lines


class Need(NamedTuple):
    """GB of a program: what it takes without images, and for each that is handled at once."""

    start: float
    image: float


def needs(reports: dict[str, Any], model: str, base_dtype: str) -> list[Need]:
    """Return those of the programs, all of whose temporaries are taken to grow with the images.

    That is a bound from above where more images are handled at once than in the row. Without a row
    of this base, that of the base in int8 with other weights.
    """
    rows = [row for row in ROWS if row.model == model and is_whole(reports, row)]
    own = [row for row in rows if row.base_dtype == base_dtype] or rows
    if not own:
        return []
    more = 0 if own[0].base_dtype == base_dtype else weights(model, "") - weights(model, "int8")
    found = {p["program"]: p for p in reports[str(own[0])]["programs"]}
    return [
        Need(
            (found[name]["memory"] - found[name]["temporaries"] + more) / 1e9,
            found[name]["temporaries"] / own[0].micro / 1e9,
        )
        for name in PROGRAMS
    ]


def is_whole(reports: dict[str, Any], row: Row) -> bool:
    """Return whether both programs of a row were compiled."""
    programs = reports.get(str(row), {}).get("programs", [{"error": "missing"}])
    return not any(p["error"] for p in programs)


def weights(model: str, base_dtype: str) -> float:
    """The bytes of a transformer's frozen weights."""
    spec = LoRASpec(32, 64.0, sd3.JOINT_ATTENTION)
    described = sd3.describe_model(
        MODELS[model], lora_spec=spec, dtype=jnp.bfloat16, base_dtype=base_dtype
    )
    return float(sum(x.size * x.dtype.itemsize for x in described.base.values()))


def by_card(reports: dict[str, Any]) -> list[list[str]]:
    """The largest micro-batch of each model by the size of a card.

    A micro-batch has to divide the images of an update.
    """
    header = ["model", "base", "GB of sample", "GB of accumulate", *(f"{n} GB" for n in CARDS)]
    lines = [header]
    for model in MODELS:
        for base_dtype in ("", "int8"):
            if not (found := needs(reports, model, base_dtype)):
                continue
            fit = [min((USABLE * card - n.start) // n.image for n in found) for card in CARDS]
            most = [max((d for d in DIVISORS if d <= n), default=0) for n in fit]
            lines.append(
                [
                    model,
                    base_dtype or "bfloat16",
                    *(f"{n.start:.1f} + {n.image:.2f} an image" for n in found),
                    *(f"{m:.0f}" if m > 0 else "no" for m in most),
                ]
            )
    return lines


def report(row: Row) -> dict[str, Any]:
    made = compiled(RECIPE, TOPOLOGIES[row.chip], row.flags(), PROGRAMS)
    return {name: value for name, value in made.items() if name != "config"}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    reports = collect(__doc__ or "", {str(row): partial(report, row) for row in ROWS})
    print(markdown.table(by_chip(reports)), markdown.table(by_card(reports)), sep="\n\n")


if __name__ == "__main__":
    main()
