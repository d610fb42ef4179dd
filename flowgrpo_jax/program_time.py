"""How long a compiled program takes at least: what each of its instructions computes and moves.

An instruction of the optimised program takes as long as its products at the chip's peak, or as
the bytes that it reads from HBM and writes to it, whichever is longer. A program takes the sum,
with what is in a loop as often as it runs. That is a lower bound: elementwise arithmetic, transfers
within a chip, and the start of an instruction are not counted.

What is counted as moved: the operands and the result of an instruction, in their layout's padded
size, where they lie in HBM (`S(1)` marks those in on-chip memory). Of an operand that is only
sliced, the slice; of a result that is written in place, the update. A kernel of Pallas' is taken to
read and write everything once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from flowgrpo_jax.cost import BYTES, computations, times_run

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([0-9,]*)(?::([^{}]*))?\})?")
OPCODE = re.compile(r"([a-z][a-z0-9\-]*)\(")
CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
ALIASED = "output_to_operand_aliasing={{}: (0"  # another tiling of the operand, where it lies
WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
PATH = re.compile(r'op_name="([^"]*)"')
ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')

# Instructions that move nothing themselves: names for what is there, and those that run others.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
FREE |= {"call", "after-all", "partition-id", "replica-id", "optimization-barrier", "domain"}
SLICES = {"dynamic-slice", "slice", "gather"}


class Array(NamedTuple):
    """An array of a program, as it lies in memory."""

    shape: tuple[int, ...]
    bytes: float  # with the padding of its layout; 0 outside of HBM


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    opcode: str
    result: tuple[Array, ...]  # several of a tuple
    operands: tuple[str, ...]
    line: str


class Work(NamedTuple):
    """The work of an instruction, each time that it runs."""

    name: str
    operation: str  # the end of its path in the program that was written, such as "ff/dot_general"
    times: int
    flops: float
    bytes: float

    def seconds(self, peak: float, bandwidth: float) -> float:
        """Seconds of all its runs, at `peak` FLOP/s and `bandwidth` bytes/s."""
        return self.times * max(self.flops / peak, self.bytes / bandwidth)


Computation = dict[str, Instruction]  # in the order of the program; the last one is its result


def work(hlo: str, kernels: Mapping[str, float] | None = None) -> list[Work]:
    """Return the work of each instruction of a compiled program, `compiled.as_text()`.

    Args:
      kernels: {name of a Pallas kernel: FLOP of a call}, for those that the program has no figure
        of; see `cost.kernels`.
    """
    bodies, entry = computations(hlo)
    program = {name: _parse(lines) for name, lines in bodies.items()}
    times = times_run(bodies, entry)
    fused = {
        called[1]
        for computation in program.values()
        for each in computation.values()
        if each.opcode not in ("call", "async-start") and (called := CALLS.search(each.line))
    }
    counts = _Counts(program, kernels or {})
    return [
        Work(
            each.name,
            _operation(each),
            times[name],
            counts.flops(each, computation),
            counts.moved(each, computation),
        )
        for name, computation in program.items()
        if times[name] and name not in fused
        for each in computation.values()
        if each.opcode not in FREE and not each.opcode.endswith(("-done", "-update"))
    ]


def _operation(each: Instruction) -> str:
    found = PATH.search(each.line)
    return "/".join(found[1].split("/")[-2:]) if found else each.opcode


class _Counts:
    """The arithmetic and the traffic of single instructions."""

    def __init__(self, program: dict[str, Computation], kernels: Mapping[str, float]):
        self.program, self.kernels = program, kernels

    def called(self, each: Instruction) -> Computation | None:
        found = CALLS.search(each.line)
        return self.program.get(found[1]) if found else None

    def flops(self, each: Instruction, computation: Computation) -> float:
        if each.opcode in ("convolution", "dot"):
            return _products(each, computation)
        if each.opcode == "custom-call":
            if estimate := ESTIMATE.search(each.line):
                return float(estimate[1])
            known = [k for k in self.kernels if each.name.startswith(k)]
            return self.kernels[max(known, key=len)] if known else 0.0
        inner = self.called(each)
        return sum(self.flops(i, inner) for i in inner.values()) if inner else 0.0

    def moved(self, each: Instruction, computation: Computation) -> float:
        if each.opcode.endswith("-start"):
            return self._started(each, computation)
        read = (
            self._read(each, place, _size(computation[name].result))
            for place, name in enumerate(each.operands)
            if name in computation
        )
        return sum(read) + self._written(each, computation)

    def _read(self, user: Instruction, place: int, full: float) -> float:
        """Return the bytes that an instruction reads of an operand of `full` bytes."""
        if not full:
            return 0.0
        if user.opcode in SLICES:
            return min(_padded(user.result), full) if place == 0 else full
        if user.opcode == "dynamic-update-slice" and place == 0:
            return 0.0
        inner = self.called(user) if user.opcode == "fusion" else None
        if inner is None:
            return full
        parameter = next(
            i for i in inner.values() if i.opcode == "parameter" and f"parameter({place})" in i.line
        )
        return min(self._uses(parameter.name, inner, full), full)

    def _uses(self, name: str, computation: Computation, full: float) -> float:
        """Return the bytes that a fused computation reads of its array of that name."""
        if name == list(computation)[-1]:
            return full
        read = 0.0
        for user in computation.values():
            for place, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.opcode == "bitcast" or ALIASED in user.line:
                    read += self._uses(user.name, computation, full)
                else:
                    read += self._read(user, place, full)
        return read

    def _written(self, each: Instruction, computation: Computation) -> float:
        size, inner = _size(each.result), self.called(each) if each.opcode == "fusion" else None
        last = each if inner is None else list(inner.values())[-1]
        while inner is not None and last.opcode == "bitcast" and last.operands[0] in inner:
            last = inner[last.operands[0]]
        if last.opcode == "dynamic-update-slice" and size:
            where = computation if inner is None else inner
            return min(_padded(where[last.operands[1]].result), size)
        return size

    def _started(self, each: Instruction, computation: Computation) -> float:
        """A transfer that begins here: (operand, result, context), or of several operands."""
        arrays = [a for a in each.result if math.prod(a.shape) > 1]
        if each.opcode in ("copy-start", "slice-start", "async-start") and len(arrays) >= 2:
            source, target = arrays[0], arrays[1]
            logical = min(_plain(source), _plain(target))
            return logical * (bool(source.bytes) + bool(target.bytes))
        read = sum(_size(computation[n].result) for n in each.operands if n in computation)
        return read + max(_size(each.result) - read, 0.0)


def _parse(lines: list[str]) -> Computation:
    found = {}
    for line in lines:
        if not (match := INSTRUCTION.match(line)):
            continue
        name, rest = match.groups()
        opcode = OPCODE.search(rest)
        if not opcode:
            continue
        result = tuple(_array(*a) for a in ARRAY.findall(rest[: opcode.start()]))
        operands = tuple(re.findall(r"%([\w.\-]+)", _arguments(rest[opcode.end() :])))
        found[name] = Instruction(name, opcode[1], result, operands, line)
    return found


def _arguments(text: str) -> str:
    """Return the part of a text before the bracket that closes it."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:i]
    return text


def _array(kind: str, sizes: str, order: str, tiles: str) -> Array:
    shape = tuple(int(n) for n in sizes.split(",") if n)
    size = float(BYTES.get(kind, 0) * math.prod(_laid_out(shape, order, tiles)))
    return Array(shape, 0.0 if re.search(r"S\([1-9]\)", tiles) else size)


def _laid_out(shape: tuple[int, ...], order: str, tiles: str) -> list[int]:
    """Return the sizes of an array, major first, padded to the layout's tile such as T(8,128)."""
    minor_to_major = [int(n) for n in order.split(",") if n]
    sizes = [shape[axis] for axis in reversed(minor_to_major)] or list(shape)
    if not (tile := re.match(r"T\(([0-9,]+)\)", tiles)):
        return sizes
    steps = [int(n) for n in tile[1].split(",")]
    kept = len(sizes) - len(steps)
    if kept < 0:
        return sizes
    padded = [-(-n // step) * step for n, step in zip(sizes[kept:], steps)]
    return sizes[:kept] + padded


def _size(arrays: tuple[Array, ...]) -> float:
    return sum(a.bytes for a in arrays)


def _padded(arrays: tuple[Array, ...]) -> float:
    """Return the size of an instruction's result for what lies in HBM, wherever it lies itself."""
    return sum(a.bytes or 2.0 * math.prod(a.shape) for a in arrays)


def _plain(array: Array) -> float:
    return array.bytes or 2.0 * math.prod(array.shape)


def _products(each: Instruction, computation: Computation) -> float:
    """Return 2 x multiplications of a product or a convolution, whose padding costs nothing."""
    out = each.result[0].shape
    left, right = (computation[name].result[0].shape for name in each.operands[:2])
    if each.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", each.line)
        shared = math.prod(left[int(i)] for i in axes[1].split(",") if i) if axes else 1
        return 2.0 * math.prod(out) * shared
    labels = LABELS.search(each.line)
    if labels is None:
        return 0.0
    lhs, rhs, result = labels.groups()
    window = WINDOW.search(each.line)
    options = dict(item.split("=") for item in window[1].split()) if window else {}
    pairs = 1
    for axis in (c for c in result if c.isdigit()):
        taps = right[rhs.index(axis)], left[lhs.index(axis)], out[result.index(axis)]
        pairs *= _pairs(*taps, int(axis), options)
    channels = right[rhs.index("i")] * out[result.index("f")] * out[result.index("b")]
    return 2.0 * channels * pairs


def _pairs(taps: int, size: int, out: int, axis: int, options: Mapping[str, str]) -> int:
    """Count the (output, tap) pairs of a spatial axis that meet a value and no padding.

    Products over a batch are written as convolutions whose dilation lets each output meet one tap.
    """

    def option(name: str, default: str) -> str:
        values = options.get(name, "").split("x")
        return values[axis] if axis < len(values) and values[axis] else default

    stride, apart = int(option("stride", "1")), int(option("lhs_dilate", "1"))
    step, before = int(option("rhs_dilate", "1")), int(option("pad", "0_0").split("_")[0])
    reach = (size - 1) * apart
    places = (o * stride + t * step - before for o in range(out) for t in range(taps))
    return sum(0 <= place <= reach and place % apart == 0 for place in places)
