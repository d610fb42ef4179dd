"""Prompt sources, and the prompts of an epoch as a pure function of (seed, epoch).

Sources by name:
  a path ending in .txt           one prompt a line
  a path ending in .jsonl         one record a line, with at least "prompt"
  geneval:train  :test  :seen  :unseen   generated (geneval.py)
  ocr:train  :test                       generated (ocr.py)
  shapes:train  :test                    the bundled world (worlds/shapes/grammar.py)
  shapes:train:position                  its prompts of one tag
  signs:train  :test                     the world of short words (worlds/signs/grammar.py)
  package.module:function:split          records of the user's own: function(split, exclude)

The files of yifan123/flow_grpo (`dataset/*/{train,test}.txt`, `{train,test}_metadata.jsonl`) are
read as they are. A record is what rewards get as metadata. Keys with a meaning here:
  "prompt"   the text
  "tag"      a text; prompts.tag_weights and the evaluation's table go by it
  "task"     with prompts.tasks the task that the record is for, which tasks.py sets; a single
             source may have such a key of its own, which changes nothing
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from flowgrpo_jax import tables
from flowgrpo_jax.prompts import geneval, ocr, prompt_file
from flowgrpo_jax.types import Metadata, PromptBatch
from flowgrpo_jax.worlds.shapes import grammar as shapes
from flowgrpo_jax.worlds.signs import grammar as signs

# name -> prompts(split, records that must not come up in training)
GENERATORS: dict[str, Callable[[str, Iterable[Metadata]], list[Metadata]]] = {
    "geneval": geneval.prompts,
    "ocr": ocr.prompts,
    "shapes": lambda split, exclude: shapes.prompts(*split.split(":", 1)),
    "signs": lambda split, exclude: signs.prompts(split),
}


def load(source: str, exclude: Iterable[Metadata] = ()) -> list[Metadata]:
    """Return the records of a source, each with its "prompt"; of equal records the first stays.

    Args:
      exclude: records that a generator leaves out of its training prompts; files are left alone.

    Raises FileNotFoundError or ValueError that names the source and what it should be.
    """
    name, _, split = source.partition(":")
    if name in GENERATORS and split:
        return GENERATORS[name](split, exclude)
    path = Path(source).expanduser()
    if source.count(":") == 2 and not path.is_file():
        return _own(source, exclude)
    if not path.is_file():
        generated = ", ".join(f"{name}:train" for name in GENERATORS)
        raise FileNotFoundError(
            f"prompt source {source!r} is no file: give a .txt, a .jsonl or one of {generated}"
        )
    unique: dict[str, Metadata] = {}
    for _, record in prompt_file.records(path):
        unique.setdefault(json.dumps(record, sort_keys=True), record)
    if not unique:
        raise ValueError(f"prompt source {source!r} holds no prompt: write one a line")
    return list(unique.values())


def _own(source: str, exclude: Iterable[Metadata]) -> list[Metadata]:
    """Return the records of the user's own function. Raises ValueError for what is no record."""
    name, _, split = source.rpartition(":")
    records = list(tables.find({}, name, "prompt source")(split, exclude))
    for i, record in enumerate(records):
        if not isinstance(record, Mapping) or not isinstance(record.get("prompt"), str):
            raise ValueError(
                f"prompt source {source!r}: record {i}, {record!r}, must be a dict with the text"
                " of the prompt under 'prompt'"
            )
    if not records:
        raise ValueError(
            f"prompt source {source!r} holds no prompt: its function must return one or more"
        )
    return records


def place(record: Metadata, source: str) -> str:
    """Say where a record of a source is, for an error about it: the file and the line.

    Reads the file again, so that records need not carry their place to the rewards. A generated
    prompt has no line: its source and its text say where it is. A record may have more than its
    line, for tasks.py adds to it: the line that has most of it counts.
    """
    path = Path(source).expanduser()
    if source.partition(":")[0] not in GENERATORS and path.is_file():
        parts = {
            number: len(found)
            for number, found in prompt_file.records(path)
            if {**record, **found, "task": ""} == {**record, "task": ""}  # tasks.py sets it
        }
        if parts:
            return f"{path}: line {max(parts, key=parts.__getitem__)}"
    return f"{source}: {record['prompt']!r}"


def _batch(records: Sequence[Metadata], rows: np.ndarray) -> PromptBatch:
    chosen = [records[i] for i in rows]
    return PromptBatch([r["prompt"] for r in chosen], chosen, np.asarray(rows, np.int32))


def chosen(batch: PromptBatch, places: np.ndarray) -> PromptBatch:
    """Return the prompts at these places of a batch, i64 [P]."""
    texts = [batch.prompts[i] for i in places]
    return PromptBatch(texts, [batch.metadata[i] for i in places], batch.ids[places])


def sample(
    records: Sequence[Metadata],
    n: int,
    *,
    seed: int,
    epoch: int,
    tag_weights: Mapping[str, float] | None = None,
    task_weights: Mapping[str, float] | None = None,
) -> PromptBatch:
    """The n distinct records of an epoch.

    Args:
      tag_weights: relative frequency of each "tag" within its task (absent: 0); a task none of
        whose tags is named draws from all its records alike.
      task_weights: relative frequency of each "task" (absent: 0); without it "task" says nothing.
    """
    p = frequencies(records, tag_weights or {}, task_weights or {})
    available = int((p > 0).sum())
    if available < n:
        raise ValueError(
            f"sample.groups={n} distinct prompts an epoch, but the source has {available}:"
            " lower sample.groups or give more prompts"
        )
    rng = np.random.default_rng([seed, epoch])
    return _batch(records, rng.choice(len(records), size=n, replace=False, p=p))


def frequencies(
    records: Sequence[Metadata], tag_weights: Mapping[str, float], task_weights: Mapping[str, float]
) -> np.ndarray:
    """Return the probability of each record in the first draw: f64 [len(records)], of sum 1.

    Without `task_weights` all records are of one task, whatever "task" they have.
    """
    kinds = [(r["task"] if task_weights else "", r.get("tag", "")) for r in records]
    counts, tasks = Counter(kinds), Counter(task for task, _ in kinds)
    _known("prompts.tag_weights", tag_weights, {tag for _, tag in counts}, "tags")
    _known("prompts.tasks", task_weights, set(tasks), "tasks")
    share: dict[tuple[str, str], float] = {}  # of one record of this kind
    for task, size in tasks.items():
        mine = {kind: n for kind, n in counts.items() if kind[0] == task}
        if not any(tag in tag_weights for _, tag in mine):
            within = dict.fromkeys(mine, 1 / size)
        else:
            total = sum(tag_weights.get(tag, 0.0) for _, tag in mine) or 1.0
            within = {kind: tag_weights.get(kind[1], 0.0) / total / n for kind, n in mine.items()}
        weight = task_weights.get(task, 0.0) if task_weights else 1.0
        share |= {kind: weight * x for kind, x in within.items()}
    p = np.array([share[kind] for kind in kinds])
    return p / (p.sum() or 1.0)


def _known(knob: str, weights: Mapping[str, float], names: set[str], what: str) -> None:
    if absent := sorted(set(weights) - names):
        raise ValueError(
            f"{knob} names {absent}, but the source's {what} are {sorted(names)}: correct the"
            " names, or leave it empty"
        )


def balanced(records: Sequence[Metadata], n: int) -> tuple[PromptBatch, np.ndarray]:
    """n prompts for an evaluation, the tags in equal shares, and each one's repetition i32 [n].

    Every tag goes through its prompts in a fixed shuffled order and starts again when it runs out;
    a repetition gets other noise. Always the same for the same source.
    """
    if not records:
        raise ValueError("no prompts to evaluate: set prompts.test, or a task's, to a source")
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
