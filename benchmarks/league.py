"""Rank the algorithms on the bundled model: the same images, seeds and evaluation for each.

    python -m benchmarks.league --rows grpo,nft,awm --seeds 0,1 --images 14400
    python -m benchmarks.league --table

The first command trains every row's recipe with every seed until it has drawn so many images, and
measures its EMA weights; the row "base" is the model before training. It writes a JSON file a run
into `--out` and passes over those that are there; a run that is stopped goes on from its last
checkpoint. The second one makes docs/images/league.png from these files and prints their tables.

A run is measured by pictures of the 40-step ODE: strict accuracy, graded reward and unrecognisable
shapes on held-out prompts, the same on the prompts of training with other seeds, how much the
pictures of one prompt differ, and the loss of flow matching on true pictures of the world, which
says how much of the base model was lost.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import claims, machine, standings
from flowgrpo_jax import evaluate
from flowgrpo_jax.assembly.run import Run, build_run
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.command_line import recipe_files
from flowgrpo_jax.costs import run_costs
from flowgrpo_jax.models import layers
from flowgrpo_jax.models.sd3.architecture import read
from flowgrpo_jax.models.vae import VAE
from flowgrpo_jax.storage import logs
from flowgrpo_jax.train import train
from flowgrpo_jax.types import Params
from flowgrpo_jax.worlds.shapes import grammar
from flowgrpo_jax.worlds.shapes.world import WORLD

RESULTS = machine.ROOT / "benchmarks" / "results" / "league"
FIGURE = machine.ROOT / "docs" / "images" / "league.png"
REWARDS = ("shapes", "shapes_strict", "shapes_unknown")
TRUE_PICTURES = 512
BASE = policies.BASE  # the row of the model before training


def rows() -> dict[str, str]:
    """{row of the league: name of its recipe}"""
    last = {name.rpartition("/")[2]: name for name in recipe_files.names()}
    chosen = {row: name for row, name in last.items() if name.startswith("algorithms/")}
    return {BASE: "shapes", "grpo": "shapes", **chosen}


def settings(row: str, seed: int, images: int, evaluated: int) -> ConfigDict:
    """The recipe of a row, for so many images of training and of evaluation.

    "grpo+VARIANT" is that of a claim. Raises KeyError for a row that there is not.
    """
    recipe_row, _, variant = row.partition("+")
    config = runpy.run_path(recipe_files.find(rows()[recipe_row]))["get_config"]()
    if variant:
        claims.apply(config, variant)
    config.seed = seed
    config.epochs = -(-images // (config.sample.groups * config.sample.group_size))
    config.eval.every = max(config.epochs // 4, 1)
    config.eval.images, config.eval.rewards = evaluated // 4, REWARDS
    config.checkpoint.every = max(config.epochs // 4, 1)
    config.checkpoint.best, config.log.tensorboard = "", False
    return config


def run(
    row: str, seed: int, images: int, evaluated: int, workdir: Path, hardware: dict[str, Any]
) -> dict[str, Any]:
    """Train a row, or go on with it, and measure it. The base model is measured alone."""
    config = settings(row, seed, images, evaluated)
    if row == BASE:
        described = {"row": row, "seed": 0, "images": 0, "minutes": 0.0, "forwards": 0.0}
        figures = measure(config, evaluated, BASE)
        return {**described, "curve": [], "reward": [], **figures, "machine": hardware}
    train(config, workdir, resume=True)
    history = logs.read(workdir / "metrics.jsonl")
    drawn = config.sample.groups * config.sample.group_size
    curve = [
        (history_row["epoch"] * drawn, history_row["eval/shapes_strict"])
        for history_row in history
        if "eval/shapes_strict" in history_row
    ]
    return {
        "row": row,
        "seed": seed,
        "images": config.epochs * drawn,
        "minutes": sum(r.get("seconds", 0.0) for r in history) / 60,
        "forwards": forwards(config),
        "curve": curve,
        "reward": [r["reward"] for r in history if "reward" in r],
        **measure(config, evaluated, workdir),
        "machine": hardware,
        "config": config.to_dict(),
    }


def forwards(config: ConfigDict) -> float:
    """The transformer's forward passes an image of training, averaged over the first 100 epochs."""
    run = build_run(config.copy_and_resolve_references())
    return float(
        np.mean([run_costs.passes(run, i).forwards for i in range(min(config.epochs, 100))])
    )


def measure(config: ConfigDict, evaluated: int, workdir: Path | str) -> dict[str, Any]:
    """The figures of a run's EMA weights, or of the base model's where `workdir` is `BASE`."""
    config = config.copy_and_resolve_references()
    config.eval.images = evaluated
    held_out = build_run(config, training=False)
    policy = policies.load(workdir, held_out.model, held_out.mesh)
    policy = held_out.put(policy)
    result, pictures, batch = evaluate.evaluate(held_out, policy)
    config.prompts.test, config.eval.seed = config.prompts.train, config.eval.seed + 1
    seen, _, _ = evaluate.evaluate(build_run(config, training=False), policy)
    return {
        "evaluated": evaluated,
        "held_out": result["metrics"],
        "per_tag": {tag: m["shapes_strict"] for tag, m in result["per_tag"].items()},
        "trained_prompts": seen["metrics"],
        "difference": difference(pictures, batch.ids),
        "colour_entropy": colour_entropy(pictures),
        "true_loss": true_loss(held_out, policy),
    }


def difference(pictures: np.ndarray, ids: np.ndarray) -> float:
    """The mean absolute difference, in levels of 255, of two pictures of the same prompt."""
    found = []
    for prompt in np.unique(ids):
        own = pictures[ids == prompt].astype(np.float32)
        found += [np.abs(a - b).mean() for i, a in enumerate(own) for b in own[:i]]
    return float(np.mean(found)) if found else float("nan")


def colour_entropy(pictures: np.ndarray) -> float:
    """The mean entropy, in bits, of a picture's colours in 4 levels a channel."""
    levels = (pictures // 64).reshape(len(pictures), -1, 3) @ np.array([16, 4, 1])
    shares = np.stack([np.bincount(row, minlength=64) for row in levels]) / levels.shape[1]
    return float(-(shares * np.log2(np.maximum(shares, 1e-12))).sum(1).mean())


def true_loss(run: Run, policy: Params) -> float:
    """The loss of flow matching on true pictures of the world: mean |v - (noise - x_0)|^2."""
    rng = np.random.default_rng(7)
    records = rng.choice(np.array(grammar.prompts("all"), object), TRUE_PICTURES)
    shown = np.stack([WORLD.picture(record, rng) for record in records])
    config = read(run.model.directory).vae
    vae, _ = layers.abstract(lambda rngs: VAE(config, rngs=rngs))

    @jax.jit
    def loss(policy, weights, pictures, cond, sigma, noise):
        z, _ = vae(weights["vae"], pictures, method="encode")
        x_0 = (z - (config.shift_factor or 0.0)) * config.scaling_factor
        s = sigma[:, None, None, None]
        v = run.model.velocity(
            policy, weights["transformer"], (1 - s) * x_0 + s * noise, sigma, cond
        )
        return jnp.square(v - (noise - x_0)).mean()

    shape, size, losses = run.model.latent_shape(*shown.shape[1:3]), 64, []
    for i in range(0, TRUE_PICTURES, size):
        cond = run.model.encode([record["prompt"] for record in records[i : i + size]])
        sigma = (np.arange(size, dtype=np.float32) + 0.5) / size
        noise = rng.normal(size=(size, *shape)).astype(np.float32)
        pictures = shown[i : i + size].astype(np.float32) / 127.5 - 1
        losses.append(loss(policy, run.weights, pictures, cond, sigma, noise))
    return float(np.mean(losses))


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument(
        "--rows", default=",".join(rows()), help="rows, separated by commas; CLAIMS: the variants"
    )
    parser.add_argument("--seeds", default="0,1", help="seeds, separated by commas")
    parser.add_argument("--images", type=int, default=14_400, help="images of training a run")
    parser.add_argument("--evaluated", type=int, default=1_152, help="pictures that measure a run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument(
        "--runs",
        type=Path,
        default=machine.ROOT / "runs" / "league",
        help="folder of work directories",
    )
    parser.add_argument("--table", action="store_true", help="draw and print what is there")
    parser.add_argument("--claims", action="store_true", help="print the verdicts on the claims")
    args = parser.parse_args()
    results = [json.loads(file.read_text()) for file in sorted(args.out.glob("*.json"))]
    if args.claims:
        print(claims.table([r for r in results if r["images"] == args.images]))
        return
    if args.table:
        ranked = [r for r in results if "+" not in r["row"]]
        standings.draw(ranked, args.images, FIGURE)
        print(standings.table(ranked), standings.by_tag(ranked), sep="\n\n")
        return
    chosen = claims.rows() if args.rows == "CLAIMS" else args.rows.split(",")
    for row in chosen:
        try:
            settings(row, 0, args.images, args.evaluated)
        except KeyError:
            known = ", ".join([*rows(), *claims.rows()[1:]])
            parser.error(f"--rows: {row!r} is not one of {known}")
    hardware = machine.described("cpu")  # now: the commit may be another one when a run has ended
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, args.seeds.split(",")):
        for row in chosen:
            name = f"{row}-{args.images}-{seed}" if row != BASE else BASE
            file = args.out / f"{name}.json"
            if not file.exists():
                result = run(row, seed, args.images, args.evaluated, args.runs / name, hardware)
                file.write_text(json.dumps(logs.plain(result), indent=1) + "\n")
            print(file, flush=True)


if __name__ == "__main__":
    main()
