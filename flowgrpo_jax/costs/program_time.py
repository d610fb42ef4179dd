"""How long a compiled program takes at least: what each of its instructions computes and moves.

An instruction of the optimised program takes as long as its products at the chip's peak, or as
the bytes that it reads from HBM and writes to it, whichever is longer. A program takes the sum,
with what is in a loop as often as it runs. Transfers that begin with `-start` run beside the others
and fill what these leave of the bandwidth; only what is left over takes time of its own. That is a
lower bound: elementwise arithmetic, transfers within a chip, and the start of an instruction are
not counted.

What is counted as moved: the operands and the result of an instruction, in their layout's padded
size, where they lie in HBM (`S(1)` marks those in on-chip memory). Of an operand that is only
sliced, the slice; of a result that is written in place, the update. A kernel of Pallas' is taken to
read and write everything once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flowgrpo_jax.costs import hlo
from flowgrpo_jax.costs.cost import computations, times_run
from flowgrpo_jax.costs.hlo import Array, Computation, Instruction

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
COPIES = {"copy-start", "slice-start", "dynamic-slice-start"}
ALLOCATION = 'custom_call_target="AllocateBuffer"'  # a place for results, which is not written


class Work(NamedTuple):
    """The work of an instruction, each time that it runs."""

    name: str
    operation: str  # the end of its path in the program that was written, such as "ff/dot_general"
    times: int
    flops: float
    bytes: float
    where: str = ""  # the computation that it belongs to, such as the body of a loop
    beside: bool = False  # whether it is a transfer that runs beside others

    def seconds(self, peak: float, bandwidth: float) -> float:
        """Seconds of all its runs, at `peak` FLOP/s and `bandwidth` bytes/s."""
        return self.times * max(self.flops / peak, self.bytes / bandwidth)

    def idle(self, peak: float, bandwidth: float) -> float:
        """Seconds for which HBM could serve others meanwhile."""
        return self.times * max(self.flops / peak - self.bytes / bandwidth, 0.0)


BESIDE = "transfers that nothing hides"


def by_operation(works: Iterable[Work], peak: float, bandwidth: float) -> dict[str, float]:
    """Return the seconds of each operation; `BESIDE` are those of the transfers that are left over.

    A transfer may be hidden by any work of its own computation, and by none of another one.
    """
    found: dict[str, float] = {}
    left: dict[str, float] = {}
    for w in works:
        seconds = w.seconds(peak, bandwidth)
        if w.beside:
            left[w.where] = left.get(w.where, 0.0) + seconds
        else:
            found[w.operation] = found.get(w.operation, 0.0) + seconds
            left[w.where] = left.get(w.where, 0.0) - w.idle(peak, bandwidth)
    return found | {BESIDE: sum(max(seconds, 0.0) for seconds in left.values())}


def work(text: str, kernels: Mapping[str, float] | None = None) -> list[Work]:
    """Return the work of each instruction of a compiled program, the text of `compiled.as_text()`.

    Args:
      kernels: {name of a Pallas kernel: FLOP of a call}, for those that the program has no figure
        of; see `cost.kernels`.
    """
    bodies, entry = computations(text)
    program = {name: hlo.parse(lines) for name, lines in bodies.items()}
    times = times_run(bodies, entry)
    fused = {
        called[1]
        for computation in program.values()
        for each in computation.values()
        if each.opcode != "call" and (called := CALLS.search(each.line))
    }
    counts = _Counts(program, kernels or {})
    return [
        Work(
            each.name,
            _operation(each),
            times[name],
            counts.flops(each, computation),
            counts.moved(each, computation),
            name,
            each.opcode.endswith("-start"),
        )
        for name, computation in program.items()
        if times[name] and name not in fused
        for each in computation.values()
        if each.opcode not in FREE
        and not each.opcode.endswith(("-done", "-update"))
        and ALLOCATION not in each.line
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
        inner = self.called(each) if each.opcode == "fusion" else None
        if inner is None:
            return _kept(each, computation, _size(each.result))
        last = list(inner.values())[-1]
        if last.opcode == "tuple" and len(last.operands) == len(each.result):
            parts = zip(last.operands, each.result)
            return sum(_kept(inner[name], inner, array.bytes) for name, array in parts)
        return _kept(last, inner, _size(each.result))

    def _started(self, each: Instruction, computation: Computation) -> float:
        """A transfer that begins here: (operand, result, context), or of several operands."""
        arrays = [a for a in each.result if math.prod(a.shape) > 1]
        if each.opcode == "async-start" and (inner := self.called(each)):
            return sum(self.moved(i, inner) for i in inner.values() if i.opcode not in FREE)
        if each.opcode in COPIES and len(arrays) >= 2:
            source, target = arrays[0], arrays[1]
            logical = min(source.size, target.size)
            return logical * (bool(source.bytes) + bool(target.bytes))
        read = sum(_size(computation[n].result) for n in each.operands if n in computation)
        return read + max(_size(each.result) - read, 0.0)


def _kept(last: Instruction, computation: Computation, size: float) -> float:
    """Return what is written of a result of so many bytes: the update, if it is one in place."""
    while last.opcode == "bitcast" and last.operands[0] in computation:
        last = computation[last.operands[0]]
    if last.opcode == "dynamic-update-slice":
        return min(_padded(computation[last.operands[1]].result), size)
    return size


def _size(arrays: tuple[Array, ...]) -> float:
    """Return the bytes that lie in HBM."""
    return sum(a.bytes for a in arrays)


def _padded(arrays: tuple[Array, ...]) -> float:
    """Return the size of an instruction's result for what lies in HBM, wherever it lies itself."""
    return sum(a.size for a in arrays)


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
