"""Measure how noisy the gradient of each algorithm is on the bundled model.

    python -m benchmarks.noise_scale --rows grpo,awm,g2rpo --images 1728 [--out FILE.json]

Training draws images, and learns from the mean of their gradients. This command computes the
gradients of some epochs without a step of the optimiser, always with the base model's policy, and
prints three figures for each row of the league:

  * cosine: between the gradients of two epochs. It is 1 without noise, and 0 where nothing but
    noise is left.
  * noise scale: after how many images the noise of their mean gradient is as long as the gradient
    itself, tr(Sigma) / |G|^2 (McCandlish et al. 2018, arXiv 1812.06162, equation 2.9), and the same
    in forward passes of the transformer. An epoch of fewer images moves mostly at random. Where the
    cosine is uncertain, the lower limit is that of a cosine that is two standard errors larger.
  * agreement: the cosine between the gradients of a row and of the first row if both had no noise.
    Rows have seeds of their own, so that their noise is independent.

Noise does not bias the estimates: |G|^2 is the mean product of two different epochs' gradients. A
loss on data (DDRL, Pinterest) is left out. What a learning rate, Adam's moments or several updates
make of such a gradient is not measured: the league does that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import league, machine, markdown
from flowgrpo_jax.assembly import parts
from flowgrpo_jax.assembly.run import Run, build_run
from flowgrpo_jax.command_line.stop import Stop
from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.train import draw
from flowgrpo_jax.training import credit, gradient
from flowgrpo_jax.training.run_state import initial_state
from flowgrpo_jax.training.stages import Stages

LEAST_EPOCHS = 3


def gradients(run: Run, epochs: int) -> np.ndarray:
    """Return the gradient of each epoch at the first policy, f64 [epochs, D]: the mean over the
    epoch's updates."""
    state, found = initial_state(run), []
    with Stop() as stop:
        for epoch in range(epochs):
            batch = parts.draw_prompts(run.config, run.train_prompts, epoch)
            cond = run.encode(batch.prompts)
            stages = Stages()
            rollouts, scores, pixels = draw(run, state, cond, batch, epoch, stop, stages)
            state, assigned = credit.assign(run, state, scores, batch.ids, rollouts, pixels)
            key = sampler.epoch_key(state.key, epoch, sampler.TERMS_KEY)
            credits = credit.cut(assigned, run.plan.updates * run.plan.micro_batches)
            terms, inputs = run.algorithm.terms(run.setup, key), run.reward_inputs(batch.ids)
            one = [
                gradient.of_update(
                    run, state, cond, rollouts, credits, terms, inputs, number, stop.check
                )[0]
                for number in range(run.plan.updates)
            ]
            found.append(np.mean([flat(g) for g in one], axis=0))
    return np.stack(found)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def squared_length(found: np.ndarray) -> float:
    """|G|^2 without the noise's share, from independent gradients [N, D], N > 1."""
    total, n = found.sum(0), len(found)
    return float((total @ total - np.square(found).sum()) / (n * (n - 1)))


def cosine(found: np.ndarray) -> float:
    """The cosine between two of the gradients [N, D]: |G|^2 over their mean squared length."""
    return squared_length(found) / float(np.square(found).sum(1).mean())


def noise_scale(share: float, images: int) -> float | None:
    """tr(Sigma) / |G|^2 in images, from the cosine of two epochs of so many images each; None where
    no direction is left."""
    return images * (1 - share) / share if share > 0 else None


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine between what two sets of independent gradients [N, D] and [M, D] are without their
    noise; NaN where one of them has no direction left. Noise may carry it beyond 1."""
    lengths = squared_length(a) * squared_length(b)
    if min(squared_length(a), squared_length(b)) <= 0:
        return float("nan")
    return float(a.mean(0) @ b.mean(0) / np.sqrt(lengths))


def error(figure: Callable[[np.ndarray], float], found: np.ndarray) -> float:
    """The standard error of a figure by the jackknife: without each of the N gradients in turn."""
    n = len(found)
    left = np.array([figure(np.delete(found, i, axis=0)) for i in range(n)])
    return float(np.sqrt((n - 1) / n * np.square(left - left.mean()).sum()))


def measure(row: str, seed: int, images: int, first: np.ndarray | None) -> tuple[Any, np.ndarray]:
    """The figures of a row, and its gradients; `first` are those of the first row."""
    config = league.settings(row, seed, images, evaluated=48)
    config.prompts.test = ""  # nothing is evaluated
    if config.epochs < LEAST_EPOCHS:
        raise ValueError(
            f"--images={images}: {config.epochs} epochs of {row}, and the errors need at least"
            f" {LEAST_EPOCHS}; draw more images"
        )
    run = build_run(config)
    drawn = run.plan.groups * run.plan.group_size
    found = gradients(run, config.epochs)
    share, uncertain = cosine(found), error(cosine, found)
    scale = noise_scale(share, drawn)
    figures = {
        "images_an_epoch": drawn,
        "epochs": config.epochs,
        "cosine": share,
        "cosine_error": uncertain,
        "noise_scale": scale,
        "noise_scale_least": noise_scale(share + 2 * uncertain, drawn),
        "noise_scale_forwards": scale and scale * league.forwards(config),
    }
    if first is not None and not np.isnan(agreed := agreement(found, first)):
        figures["agreement"] = agreed
        own = error(lambda some: agreement(some, first), found)
        others = error(lambda some: agreement(found, some), first)
        figures["agreement_error"] = float(np.hypot(own, others))
    return figures, found


HEADER = ["row", "images an epoch", "epochs", "cosine", "noise scale, images", "at least",
          "in forwards", "agreement"]  # fmt: skip


def table(rows: dict[str, Any]) -> str:
    """The rows in Markdown; a figure that is not known is left empty."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}"

    lines = [
        [
            name,
            f"{r['images_an_epoch']}",
            f"{r['epochs']}",
            f"{r['cosine']:.3f} ± {r['cosine_error']:.3f}",
            number(r["noise_scale"]),
            number(r["noise_scale_least"]),
            number(r["noise_scale_forwards"]),
            f"{r['agreement']:.2f} ± {r['agreement_error']:.2f}" if "agreement" in r else "",
        ]
        for name, r in rows.items()
    ]
    return markdown.table([HEADER, *lines])


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument(
        "--rows", default="grpo,awm,dgpo,g2rpo", help="rows of the league, by comma"
    )
    parser.add_argument("--images", type=int, default=1728, help="images of each row")
    parser.add_argument("--out", type=Path, help="JSON file to write, after each row")
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine.described("cpu"), "rows": {}}
    first = None
    for seed, row in enumerate(args.rows.split(",")):
        report["rows"][row], found = measure(row, seed, args.images, first)
        first = found if first is None else first
        print(table({row: report["rows"][row]}).splitlines()[-1], flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
