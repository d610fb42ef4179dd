"""What the monitors say of a trained adapter of the bundled model, beside the base model.

    python -m benchmarks.monitors --checkpoint benchmarks/results/shapes-400/lora --out FILE

The limits in flowgrpo_jax/monitors/verdicts.py were set by this: an honest run raises no alarm.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import machine
from flowgrpo_jax import evaluate
from flowgrpo_jax.assembly.run import Run, build_run
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.command_line.stop import Stop
from flowgrpo_jax.configs import shapes
from flowgrpo_jax.monitors import verdicts
from flowgrpo_jax.training import run_evaluation

TRUE_PICTURES = "flowgrpo_jax.worlds.shapes.world:true_pictures"


def figures(run: Run, checkpoint: str) -> dict[str, float]:
    """The evaluation and the monitors of a policy, as a run has them in its metrics."""
    policy = run.put(policies.load(checkpoint, run.model, run.mesh))
    state: Any = SimpleNamespace(policy=policy, copies={"ema": policy})
    batch, pixels, scores = evaluate.draw_balanced(run, policy)
    found = evaluate.figures_of(evaluate.summarise(batch, scores))
    return found | run_evaluation.monitored(run, state, batch, pixels, Stop())


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="as of flowgrpo_jax.evaluate")
    parser.add_argument("--images", type=int, default=288, help="pictures of each")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    config = shapes.get_config()
    config.model.product_dtype, config.monitor.pictures = "", TRUE_PICTURES
    config.eval.images = args.images
    run = build_run(config, training=False)
    rows = [
        {"epoch": epoch, **figures(run, checkpoint)}
        for epoch, checkpoint in enumerate(("base", args.checkpoint))
    ]
    for v in verdicts.verdicts(rows, config.reward.weights)[1]:
        print(f"{v.level:6}{v.figure:20}{v.first:9.4f} -> {v.now:.4f}  {v.says}")
    if args.out:
        report = {"checkpoint": args.checkpoint, "machine": machine.described("cpu"), "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
