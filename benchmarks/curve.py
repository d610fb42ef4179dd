"""The learning curve of a run as a picture.

python -m benchmarks.curve --workdir DIR --out FILE
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import machine
from flowgrpo_jax.storage import logs

LABELS = {
    "shapes_strict": "strict accuracy",
    "shapes_unknown": "unrecognisable",
    "ocr": "OCR score",
    "ocr_exact": "words read right",
}


def curve(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """(minutes of training so far, values) of the epochs that have `key`."""
    minutes, xs, ys = 0.0, [], []
    for row in rows:
        if key in row:
            xs.append(minutes)
            ys.append(row[key])
        minutes += row.get("seconds", 0.0) / 60
    return xs, ys


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of the training run")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    args = parser.parse_args()
    rows = logs.read(args.workdir / "metrics.jsonl")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    left.plot(*curve(rows, "reward"), linewidth=0.8)
    left.set(xlabel="minutes of training", ylabel="reward of the rollouts, 0 to 1")
    for key, label in LABELS.items():
        if any(f"eval/{key}" in row for row in rows):
            right.plot(*curve(rows, f"eval/{key}"), marker=".", label=label)
    right.set(xlabel="minutes of training", ylabel="held-out prompts, 40-step ODE", ylim=(0, 1))
    right.legend()
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
