"""Evaluate a policy: deterministic ODE sampling of the test prompts with fixed seeds.

    python -m flowgrpo_jax.evaluate --config shapes --checkpoint base --out base.json
    python -m flowgrpo_jax.evaluate --config shapes --checkpoint runs/shapes --out rl.json

`--checkpoint` is "base", a work directory or its `checkpoints` folder (the EMA weights of the
newest checkpoint, or `checkpoints/STEP`), its `best` folder, or an exported LoRA. Writes the mean
of every reward over all images and per tag as JSON, together with the model, the prompts and the
settings, and a grid of pictures next to it.
"""

from __future__ import annotations

from flowgrpo_jax.compilation import huge_pages

if __name__ == "__main__":
    huge_pages.restart()  # before the imports below, which take seconds

import json
import operator
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from flowgrpo_jax import prompts, sharding
from flowgrpo_jax.assembly import settings
from flowgrpo_jax.assembly.run import Run, build_run
from flowgrpo_jax.checkpoints import policies, run_checkpoints
from flowgrpo_jax.command_line import cli, connection
from flowgrpo_jax.command_line.stop import Stop
from flowgrpo_jax.models import TEXTS
from flowgrpo_jax.sampling import sampler
from flowgrpo_jax.scoring.pending import PendingScores
from flowgrpo_jax.scoring.scores import Scores
from flowgrpo_jax.storage import logs, outputs, picture_grid
from flowgrpo_jax.types import Params, PromptBatch


def evaluate(
    run: Run, policy: Params, stop: Stop | None = None, *, progress: bool = False
) -> tuple[dict[str, Any], np.ndarray, PromptBatch]:
    """Return the means of every reward, overall and per tag, the images uint8 [n, ...] and their
    prompts.

    `errors` and `errors_per_tag` are the standard errors of these means. A failed reward counts in
    no mean; `failed` is the share of images with one, `failures` that of each reward, and `broken`
    the share of images with pixels that are not finite, for which every reward fails. Raises
    Stopped when `stop` is asked to stop.
    """
    batch, pixels, scores = draw_balanced(run, policy, stop, progress=progress)
    return summarise(batch, scores), pixels, batch


def draw_balanced(
    run: Run, policy: Params, stop: Stop | None = None, *, progress: bool = False
) -> tuple[PromptBatch, np.ndarray, Scores]:
    """Return the evaluation's prompts, its images uint8 [n, ...] and their scores.

    Raises Stopped when `stop` is asked to stop.
    """
    batch, repeats = prompts.balanced(run.test_prompts, run.config.eval.images)
    pixels, scores = draw(run, policy, batch, repeats, stop or Stop(), progress)
    return batch, pixels, scores


def summarise(batch: PromptBatch, scores: Scores) -> dict[str, Any]:
    """Return the figures of an evaluation; see `evaluate`."""
    tags = np.array([m.get("tag", "") for m in batch.metadata])
    by_tag = {tag: scores.of(tags == tag) for tag in sorted(set(tags)) if tag}
    failed = dict(zip(scores.names, scores.failed))
    return {
        "metrics": scores.means(),
        "per_tag": {tag: part.means() for tag, part in by_tag.items()},
        "errors": scores.errors(),
        "errors_per_tag": {tag: part.errors() for tag, part in by_tag.items()},
        "images": len(batch.ids),
        "failed": float(scores.failed.any(axis=0).mean()),
        "failures": {name: float(missing.mean()) for name, missing in failed.items()},
        "broken": scores.broken,
    }


def draw(
    run: Run,
    policy: Params,
    batch: PromptBatch,
    repeats: np.ndarray,
    stop: Stop,
    progress: bool,
) -> tuple[np.ndarray, Scores]:
    """Draw and score an image for each prompt of the batch. Returns the images, uint8 [n, ...], and
    their scores.

    Args:
      repeats: i32 [n], how many images of the same prompt come before each.
    """
    config, n = run.config.eval, len(batch.ids)
    micro = config.micro_batch or run.plan.micro_batch
    unique, rows = np.unique(batch.ids, return_inverse=True)
    texts = encode_many(run, [run.test_prompts[i]["prompt"] for i in unique])
    key = jax.random.key(config.seed)
    padded = np.arange(-(-n // micro) * micro) % n  # static shapes
    parts = tqdm(np.split(padded, len(padded) // micro), desc="evaluate", disable=not progress)
    with PendingScores(run.test_scorer, batch.ids, keep_pixels=True) as pending:
        for part in parts:
            stop.check()
            own, row = np.unique(rows[part], return_inverse=True)
            filled = np.resize(np.arange(len(own)), micro)  # static shapes
            cond = sharding.replicate(
                run.mesh, jax.tree.map(operator.itemgetter(own[filled]), texts)
            )
            prepared = run.test_scorer.prepare(unique[own])
            prepared = jax.tree.map(operator.itemgetter(filled), prepared)
            keys = sampler.image_keys(key, 0, batch.ids[part], repeats[part])
            row, keys = sharding.split_rows(run.mesh, (row.astype(np.int32), keys))
            pictures = run.programs.generate(policy, run.weights, cond, run.empty, row, keys)
            # This fetches the previous micro-batch, and so keeps at most two in flight.
            pending.add(pictures, prepared, row)
        scores = pending.collect(stop.wait)
        return pending.pictures.pixels, scores


def encode_many(run: Run, texts: list[str]) -> Any:
    """The conditioning of an evaluation's prompts in the memory of each process: that of
    PickScore's 2,048 takes 3.4 GB, which no device needs to hold."""
    size, whole = min(len(texts), TEXTS), None
    padded = texts + texts[-1:] * (-len(texts) % size)
    for i in range(0, len(padded), size):
        part = jax.tree.map(sharding.to_host, run.encode(padded[i : i + size]))
        if whole is None:
            whole = jax.tree.map(lambda x: np.empty((len(padded), *x.shape[1:]), x.dtype), part)
        for all_of_it, x in zip(jax.tree.leaves(whole), jax.tree.leaves(part)):
            all_of_it[i : i + size] = x
    return whole


def figures_of(result: dict[str, Any]) -> dict[str, float]:
    """Return an evaluation's figures by the names that a run logs: eval/REWARD and eval/TAG/REWARD,
    and their standard errors as eval_error/REWARD and eval_error/TAG/REWARD."""
    found: dict[str, float] = {}
    for kind, whole, by_tag in (
        ("eval", "metrics", "per_tag"),
        ("eval_error", "errors", "errors_per_tag"),
    ):
        found |= {f"{kind}/{name}": value for name, value in result[whole].items()}
        for tag, values in result[by_tag].items():
            found |= {f"{kind}/{tag}/{name}": value for name, value in values.items()}
    return found


def save_grid(file: epath.Path, images: np.ndarray, batch: PromptBatch, n: int) -> None:
    if jax.process_index() > 0:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        picture_grid.grid(images[:n], batch.prompts[:n]).save(out, format="PNG")


def table(result: dict[str, Any]) -> str:
    """The result as text: a row per tag, a column per reward."""
    names = list(result["metrics"])
    rows = [("all", result["metrics"]), *result["per_tag"].items()]
    lines = [" " * 16 + "".join(f"{n:>18}" for n in names)]
    lines += [f"{tag:<16}" + "".join(f"{v[n]:18.4f}" for n in names) for tag, v in rows]
    return "\n".join(lines)


def record(config: ConfigDict, source: str, result: dict[str, Any]) -> dict[str, Any]:
    """The result and what it is of: the policy's `source`, the model, the prompts, the settings."""
    p = config.prompts
    return {
        "checkpoint": source,
        "model": config.model.path,
        "prompts": {name: task.get("test", "") for name, task in p.tasks.items()} or p.test,
        "versions": run_checkpoints.versions(),
        "config": config.eval.to_dict(),
        **result,
    }


def check_out(out: epath.Path) -> None:
    """Raise ValueError or OSError where the result cannot be written, or its picture beside it."""
    if out.suffix.lower() == ".png":
        raise ValueError(
            f"--out={out}: this is the JSON file, and the picture beside it gets the suffix .png;"
            f" give {out.with_suffix('.json')}"
        )
    outputs.check_file(out, "--out")


def main(_: list[str]) -> None:
    connection.connect()
    config = cli.config()
    settings.split_cpu(config)
    out = epath.Path(flags.FLAGS.out)
    check_out(out)
    policies.check(flags.FLAGS.checkpoint)
    with cli.compiling():
        run = build_run(config, training=False)
        policy = policies.load(flags.FLAGS.checkpoint, run.model, run.mesh)
        policy = run.put(policy)
        result, images, batch = evaluate(run, policy, progress=True)
    if jax.process_index() > 0:
        return
    print(table(result))
    written = record(config, flags.FLAGS.checkpoint, result)
    out.write_text(json.dumps(logs.plain(written), indent=2) + "\n")
    save_grid(out.with_suffix(".png"), images, batch, config.eval.grid)


if __name__ == "__main__":
    cli.define_flags(config=True)
    cli.define_cache_flag()
    policy = "The policy: base, a work directory, its best/ or checkpoints/STEP, an exported LoRA."
    flags.DEFINE_string("checkpoint", "base", policy)
    flags.DEFINE_string("out", "evaluation.json", "The JSON file to write; a .png goes beside it.")
    cli.run(main)
