"""Prompt sources, and which prompts an epoch gets: a pure function of (seed, epoch).

Sources by name:
  "shapes:train", "shapes:test"   the bundled world (shapes/grammar.py)
  a path ending in .txt           one prompt a line
  a path ending in .jsonl         one GenEval-style record a line, with at least "prompt"
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flowgrpo_jax.shapes import grammar
from flowgrpo_jax.types import Metadata, PromptBatch


def load(source: str) -> list[Metadata]:
    """All records of a source, each with its "prompt". Duplicates are dropped, the first stays.

    Raises FileNotFoundError or ValueError that names the source and what it should be.
    """
    world, _, split = source.partition(":")
    if world == "shapes" and split:
        return grammar.prompts(split)
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"prompt source {source!r} is no file: give a .txt, a .jsonl or shapes:train"
        )
    text = path.read_text(encoding="utf-8")
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        records = [_record(path, n, line) for n, line in lines]
    elif path.suffix == ".txt":
        records = [{"prompt": line.strip()} for _, line in lines]
    else:
        raise ValueError(f"prompt source {source!r}: the suffix must be .txt or .jsonl")
    if not records:
        raise ValueError(f"prompt source {source!r} holds no prompt")
    unique: dict[str, Metadata] = {}
    for record in records:
        unique.setdefault(record["prompt"], record)
    return list(unique.values())


def _record(path: Path, number: int, line: str) -> Metadata:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {number} is no JSON: {error}") from error
    if not isinstance(record, dict) or "prompt" not in record:
        raise ValueError(f'{path}: line {number} is no object with a "prompt"')
    return record


def _batch(records: Sequence[Metadata], rows: np.ndarray) -> PromptBatch:
    chosen = [records[i] for i in rows]
    return PromptBatch([r["prompt"] for r in chosen], chosen, np.asarray(rows, np.int32))


def sample(
    records: Sequence[Metadata],
    n: int,
    *,
    seed: int,
    epoch: int,
    tag_weights: Mapping[str, float] | None = None,
) -> PromptBatch:
    """The n distinct prompts of an epoch.

    Args:
      tag_weights: relative frequency of each "tag" (absent: 0); without it all records are equal.
    """
    weights = np.ones(len(records))
    if tag_weights:
        tags = [r.get("tag", "") for r in records]
        counts = Counter(tags)
        if absent := sorted(set(tag_weights) - set(counts)):
            raise ValueError(
                f"prompts.tag_weights names {absent}, but the source's tags are {sorted(counts)}:"
                " correct the names, or leave it empty"
            )
        weights = np.array([tag_weights.get(t, 0.0) / counts[t] for t in tags])
    available = int((weights > 0).sum())
    if available < n:
        raise ValueError(
            f"sample.groups={n} distinct prompts an epoch, but the source has {available}:"
            " lower sample.groups or give more prompts"
        )
    rng = np.random.default_rng([seed, epoch])
    rows = rng.choice(len(records), size=n, replace=False, p=weights / weights.sum())
    return _batch(records, rows)


def balanced(records: Sequence[Metadata], n: int) -> tuple[PromptBatch, np.ndarray]:
    """n prompts for an evaluation, the tags in equal shares, and each one's repetition i32 [n].

    Every tag goes through its prompts in a fixed shuffled order and starts again when it runs out;
    a repetition gets other noise. Always the same for the same source.
    """
    if not records:
        raise ValueError("no prompts to evaluate: set prompts.test to a source")
    by_tag: dict[str, list[int]] = {}
    for i in np.random.default_rng(0).permutation(len(records)):
        by_tag.setdefault(records[i].get("tag", ""), []).append(int(i))
    tags = sorted(by_tag)
    rows, repeats = [], []
    for k in range(n):
        pool = by_tag[tags[k % len(tags)]]
        turn = k // len(tags)
        rows.append(pool[turn % len(pool)])
        repeats.append(turn // len(pool))
    return _batch(records, np.array(rows)), np.array(repeats, np.int32)
