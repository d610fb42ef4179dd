"""The paper's epoch on TPU pods, by the compiler alone: does it fit, and what does it cost?

    python -m benchmarks.pods --out benchmarks/results/pods.json [--only v5e-16,large]

Compiles configs/geneval.py (48 groups of 24 images of 512 px, 10 steps with guidance, 2 updates;
prompts encoded ahead) with `flowgrpo_jax.compile`, once for every row of `PODS` and
`GROWTH`, and prints them as tables in Markdown. Rows that are in the file already are not compiled
again. Takes minutes a row; needs `pip install -e '.[tpu]'`, no TPU and no weights.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import machine, markdown

MEDIUM, LARGE = "stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large"
TRAINING = ("sample", "accumulate", "apply")


def flags(model: str, *, micro: int, fsdp: int = 1, tensor: int = 1) -> list[str]:
    """A row's settings. `micro` images are handled at once, over all chips."""
    return [
        f"--config.model.path={model}",
        "--config.model.text_cache=texts",
        f"--config.mesh.fsdp={fsdp}",
        f"--config.mesh.tensor={tensor}",
        f"--config.sample.micro_batch={micro}",
        f"--config.eval.micro_batch={micro}",
    ]


# name: (topology, chips, flags). Every chip that can hold the weights has a copy. 1,152 images in 2
# updates are cut into 64 parts at most, so 256 chips work four to an image.
PODS = {
    name: (topology, chips, flags(model, **settings))
    for name, topology, chips, model, settings in (
        ("v5e-16 medium", "v5e:4x4", 16, MEDIUM, {"micro": 64}),
        ("v6e-8 medium", "v6e:2x4", 8, MEDIUM, {"micro": 64}),
        ("v5p-8 medium", "v5p:2x2x1", 4, MEDIUM, {"micro": 64}),
        ("v5e-16 large", "v5e:4x4", 16, LARGE, {"micro": 64, "fsdp": 16}),
        ("v6e-8 large", "v6e:2x4", 8, LARGE, {"micro": 32, "fsdp": 8}),
        ("v5p-8 large", "v5p:2x2x1", 4, LARGE, {"micro": 32}),
    )
}
# The medium model on more v5e chips.
GROWTH = {
    "v5e-16 medium": PODS["v5e-16 medium"],
    "v5e-256 medium": ("v5e:16x16", 256, flags(MEDIUM, micro=192, tensor=4)),
}


def compiled(
    config: str, topology: str, settings: list[str], programs: tuple[str, ...] = TRAINING
) -> dict[str, Any]:
    """The tool's report, or only a verdict where the compiler itself died."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [f"--config={config}", f"--topology={topology}", f"--out={out}"]
        command.append(f"--programs={','.join(programs)}")
        done = subprocess.run(
            [sys.executable, "-m", "flowgrpo_jax.compile", *command, *settings],
            stdout=subprocess.DEVNULL,
        )
        if done.returncode < 0:
            return {"verdict": f"the compiler died: {signal.Signals(-done.returncode).name}"}
        done.check_returncode()
        return json.loads(out.read_text())


def row(name: str, chips: int, report: dict[str, Any]) -> list[str]:
    """Return a line of the table: the values that `HEADER` names."""
    if "programs" not in report:
        return [name, f"{chips}", report["verdict"], *[""] * (len(HEADER) - 3)]
    programs = [p for p in report["programs"] if p["program"] in TRAINING]
    sample = report["config"]["sample"]
    layout = report["config"]["mesh"]
    largest = max(p["memory"] for p in report["programs"])
    work = sum(p["calls"] * p["flops"] for p in programs)
    sent = sum(p["calls"] * p["links"] for p in programs)
    moved = sum(p["calls"] * p["traffic"] for p in programs)
    seconds = sum(p["calls"] * p["seconds"] for p in programs)
    at_peak = sum(p["calls"] * p["seconds"] * p["share"] for p in programs)
    images = sample["groups"] * sample["group_size"]
    return [
        name,
        f"{chips}",
        f"{layout['fsdp']} x {layout['tensor']}",
        f"{sample['micro_batch'] / chips:g}",
        f"{images:,}",
        f"{largest / 1e9:.1f}" + ("" if report["verdict"] == "it fits" else " (does not fit)"),
        f"{work / 1e15:,.1f}",
        f"{moved / 1e12:,.1f}",
        f"{sent / 1e9:,.1f}",
        f"{seconds:,.1f}",
        f"{at_peak / seconds:.2f}",
        f"{images / seconds:,.1f}",
    ]


HEADER = [
    "",
    "chips",
    "fsdp x tensor",
    "images a chip at once",
    "images an epoch",
    "GB a chip",
    "PFLOP an epoch",
    "TB moved by a chip",
    "GB sent by a chip",
    "seconds at least",
    "share of peak",
    "images/s at most",
]


def table(names: list[str], rows: dict[str, Any], reports: dict[str, Any]) -> str:
    lines = [row(name, rows[name][1], reports[name]) for name in names if name in reports]
    return markdown.table([HEADER, *lines])


def collect(description: str, rows: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Read --out and --only, and return the reports in that file with those that were missing.

    Args:
      rows: {name: what makes its report}. The file is written after each.
    """
    parser = machine.parser(description)
    parser.add_argument("--out", type=Path, required=True, help="file of all reports")
    parser.add_argument("--only", default="", help="rows that contain one of these, by comma")
    args = parser.parse_args()
    reports = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name, report in rows.items():
        if name not in reports and any(part in name for part in args.only.split(",")):
            reports[name] = report()
            args.out.write_text(json.dumps(reports, indent=1) + "\n")
            print(name, reports[name]["verdict"], flush=True)
    return reports


def main() -> None:
    rows = PODS | GROWTH
    made = {
        name: partial(compiled, "geneval", topology, settings)
        for name, (topology, _, settings) in rows.items()
    }
    reports = collect(__doc__ or "", made)
    print(*(table(list(part), rows, reports) for part in (PODS, GROWTH)), sep="\n\n")


if __name__ == "__main__":
    main()
