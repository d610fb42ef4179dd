"""The memory, arithmetic, traffic and least time of programs compiled for a TPU topology."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from flowgrpo_jax.costs import cost, program_time
from flowgrpo_jax.costs.hardware import TPUS, Chip

DEAREST = 5  # instructions of a program that are named


class Program(NamedTuple):
    """A program of a run, ready to be lowered."""

    name: str
    calls: int  # an epoch
    run: Any  # jitted
    args: tuple[Any, ...]  # shapes with their layout
    repeated: bool = False  # every chip does all of the work


class Report(NamedTuple):
    """The needs of one program; memory is in bytes per chip."""

    program: str
    calls: int
    flops: float  # a call, over all chips
    memory: float  # with all that stays on the chip meanwhile
    temporaries: float
    traffic: float  # bytes that a chip reads from HBM and writes to it, a call
    links: float  # bytes that a chip sends, a call
    collectives: dict[str, tuple[int, float]]  # kind -> how often, bytes
    seconds: float  # a call, at least: of its instructions, or of the links
    share: float  # of the chip's peak, in these seconds
    dearest: list[tuple[str, float]]  # operations that take longest, and their seconds a call
    error: str  # why it did not compile; empty when it did


def chip_bytes(tree: Any) -> float:
    """Bytes that laid out shapes take on one chip."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def inspect(program: Program, resident: Any, chip: Chip, chips: int) -> Report:
    """Compile a program for its mesh and say what it needs."""
    traced = program.run.trace(*program.args)
    work = cost.flops(traced.jaxpr)
    shapes = [x for x in jax.tree.leaves(program.args) if hasattr(x, "sharding")]
    # What is resident and also an argument is there once.
    stays = {id(x) for x in jax.tree.leaves(resident)}
    others = chip_bytes(resident) - chip_bytes([x for x in shapes if id(x) in stays])
    arithmetic = work / (1 if program.repeated else chips) / chip.peak
    empty = Report(
        program=program.name,
        calls=program.calls,
        flops=work,
        memory=0.0,
        temporaries=0.0,
        traffic=0.0,
        links=0.0,
        collectives={},
        seconds=arithmetic,
        share=1.0,
        dearest=[],
        error="",
    )
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "hbm" not in str(error).lower():
            raise
        used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)G", str(error))
        memory = float(used[1]) * 2**30 + others if used else math.inf
        return empty._replace(memory=memory, error="does not fit")
    needs = compiled.memory_analysis()
    hlo = compiled.as_text()
    found, works = cost.collectives(hlo), program_time.work(hlo, cost.kernels(traced.jaxpr))
    sent = sum(c.bytes for c in found)
    by_operation = program_time.by_operation(works, chip.peak, chip.bandwidth)
    seconds = max(arithmetic, sum(by_operation.values()), sent / chip.links)
    return empty._replace(
        memory=others
        + needs.argument_size_in_bytes
        + needs.output_size_in_bytes
        - needs.alias_size_in_bytes
        + needs.temp_size_in_bytes,
        temporaries=float(needs.temp_size_in_bytes),
        traffic=sum(w.times * w.bytes for w in works),
        links=sent,
        collectives={c.kind: (c.times, c.bytes) for c in found},
        seconds=seconds,
        share=arithmetic / seconds if seconds else 1.0,
        dearest=sorted(by_operation.items(), key=lambda item: -item[1])[:DEAREST],
    )


def table(reports: list[Report], resident: float, chip: Chip, images: int) -> str:
    """Return a line for each program, its dearest operations, and the least time of an epoch of so
    many images."""
    lines = [
        f"{'program':<11}{'calls':>6}{'GB a chip':>11}{'of':>6}{'TFLOP':>10}{'GB moved':>10}"
        f"{'GB sent':>9}{'s a call':>10}{'of peak':>9}  collectives"
    ]
    for r in reports:
        kinds = ", ".join(
            f"{n} {kind} ({sent / 1e9:.2f} GB)" for kind, (n, sent) in r.collectives.items()
        )
        lines.append(
            f"{r.program:<11}{r.calls:>6}{r.memory / 1e9:>11.2f}{chip.memory / 1e9:>6.0f}"
            f"{r.flops / 1e12:>10.1f}{r.traffic / 1e9:>10.1f}{r.links / 1e9:>9.2f}"
            f"{r.seconds:>10.3f}{r.share:>9.0%}  {r.error.upper() or kinds or '-'}"
        )
    for r in reports:
        named = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in r.dearest if s > 5e-5)
        lines += [f"dearest of {r.program}: {named}"] if named else []
    training = [r for r in reports if r.program not in ("evaluate", "judge")]
    epoch = sum(r.calls * r.seconds for r in training)
    rate = f", {images / epoch:.1f} images/s at most" if epoch else ""
    lines.append(
        f"always on a chip: {resident / 1e9:.2f} GB; an epoch takes {epoch:.1f} s at least{rate}"
    )
    return "\n".join(lines)


def advice(reports: list[Report], resident: float, chip: Chip, *, fsdp: int, remat: bool) -> str:
    """Return a text that says whether the recipe fits, or which knobs would make it fit."""
    over = [r for r in reports if r.error or r.memory > chip.memory]
    if not over:
        return "it fits"
    largest = max(over, key=lambda r: r.memory)
    knobs = []
    if resident > chip.memory / 3:
        knobs.append(
            f"config.mesh.fsdp={2 * fsdp} or more (weights and text encoders are"
            f" {resident / 1e9:.1f} GB of it)"
        )
    if largest.memory - resident > chip.memory / 3:
        knobs.append("a smaller config.sample.micro_batch (and config.eval.micro_batch)")
        knobs += [] if remat else ["config.model.remat=True"]
    return (
        f"does not fit: {', '.join(r.program for r in over)} (up to {largest.memory / 1e9:.1f} GB"
        f" of {chip.memory / 1e9:.0f}); try {'; '.join(knobs) or 'config.model.text_cache'}"
    )


def topology(name: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a topology such as v5e:4x4."""
    kind, _, sizes = name.partition(":")
    if kind not in TPUS:
        raise ValueError(f"--topology={name}: {kind!r} is not one of {', '.join(TPUS)}")
    # libtpu takes hosts to have four chips, even those of one.
    alone = {"chips_per_host_bounds": [1, 1, 1]} if set(sizes) <= set("1x") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **alone)
    except Exception as error:
        raise ValueError(
            f"--topology={name}: {error}. It takes `pip install -e '.[tpu]'` and a name such as"
            " v5e:4x4, v6e:2x4 or v5p:2x2x2"
        ) from error
    return TPUS[kind], list(found.devices)
