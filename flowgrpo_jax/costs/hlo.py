"""Read the text of a compiled program: its instructions, their operands, and how arrays lie."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from flowgrpo_jax.costs.cost import bytes_of

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([0-9,]*)(?::([^{}]*))?\})?")
OPCODE = re.compile(r"([a-z][a-z0-9\-]*)\(")


class Array(NamedTuple):
    """An array of a program, as it lies in memory."""

    shape: tuple[int, ...]
    size: float  # bytes, with the padding of its layout
    in_hbm: bool = True

    @property
    def bytes(self) -> float:
        """Its bytes in HBM: none of an array that lies in on-chip memory."""
        return self.size if self.in_hbm else 0.0


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    opcode: str
    result: tuple[Array, ...]  # several of a tuple
    operands: tuple[str, ...]
    line: str


Computation = dict[str, Instruction]  # in the order of the program; the last one is its result


def parse(lines: list[str]) -> Computation:
    """Read the lines of one computation; what is no instruction is left out."""
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
    size = float(bytes_of(kind) * math.prod(_laid_out(shape, order, tiles)))
    return Array(shape, size, not re.search(r"S\([1-9]\)", tiles))


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
