"""The cost of a program: its arithmetic, counted in the jaxpr, where every loop still has its
length, and its communication, counted in the compiled HLO, where the partitioner has decided it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

# ------------------------------------------------------------------------------- arithmetic


def flops(jaxpr: Any) -> float:
    """Multiplications and additions of all products and convolutions, over all devices.

    Elementwise work is left out. Of the branches of a condition the dearest counts.
    Raises ValueError for a loop of unknown length.
    """
    return sum(_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    match name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shared = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            return 2.0 * math.prod(eqn.outvars[0].aval.shape) * shared
        case "conv_general_dilated":
            kernel, layout = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            window = math.prod(kernel) / kernel[layout[0]]  # over inputs and space
            return 2.0 * math.prod(eqn.outvars[0].aval.shape) * window
        case "scan":
            return params["length"] * flops(params["jaxpr"])
        case "cond":
            return max(flops(branch) for branch in params["branches"])
        case "while":
            inside = flops(params["body_jaxpr"])
            if inside:
                raise ValueError(
                    "a while loop with products inside: its length is not known; write it as"
                    " lax.scan, or as lax.fori_loop with a fixed count"
                )
            return 0.0
        case "shard_map":  # a device's share of the work
            return params["mesh"].size * flops(params["jaxpr"])
        case "pallas_call":
            # A kernel may multiply more than is needed; then its estimate is the lower one.
            products = math.prod(params["grid_mapping"].grid) * flops(params["jaxpr"])
            estimate = params["cost_estimate"]
            return min(products, float(estimate.flops)) if estimate else products
    return sum(flops(inner) for inner in _jaxprs(params.values()))


def kernels(jaxpr: Any) -> dict[str, float]:
    """Return {name: multiplications and additions of a call} of the Pallas kernels in a program.

    The names are those that the compiler gives to the kernels' calls, but for a number at the end.
    """
    found: dict[str, float] = {}
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "pallas_call":
            scope = str(eqn.source_info.name_stack).rpartition("/")[2]
            own = re.sub(r"\W", "_", eqn.params["name"] or scope)
            found |= {own: _equation(eqn)} if own else {}
        else:
            for inner in _jaxprs(eqn.params.values()):
                found |= kernels(inner)
    return found


def _jaxprs(values: Any) -> Iterator[Any]:
    for value in values:
        if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _jaxprs(value)


# ---------------------------------------------------------------------------- communication


class Collective(NamedTuple):
    """One kind of collective in a program, per chip."""

    kind: str
    times: int  # how often it runs
    bytes: float  # what a chip sends in all, by the ring algorithm


# What a chip sends for one collective among n, in units of the bytes of its result.
RING = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1.0,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
BITS = re.compile(r"[a-z]+(\d+)")  # in the name of a type: s4, bf16, f8e4m3fn

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
RESULT = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
CALLED = re.compile(
    r"(calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
CHANNEL = re.compile(r"channel_id=(\d+)")
OPERATION = re.compile(rf"%?(\S+) = (.*?) ({'|'.join(RING)})(-start)?\(")


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`), those in loops as often as they
    run, sorted by kind. A loop of unknown length counts once."""
    bodies, entry = computations(hlo)
    times = times_run(bodies, entry)
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for name, lines in bodies.items():
        for line in lines:
            if not times[name] or not (operation := OPERATION.search(line)):
                continue
            own, result, kind, started = operation.groups()
            shapes = RESULT.findall(result)
            # Several that were combined return one result each. Started ones, but for all-reduce,
            # return their operands before, and scalars as contexts after.
            if started and kind != "all-reduce":
                shapes = [shape for shape in shapes if shape[1]]
                shapes = shapes[len(shapes) // 2 :]
            size = sum(_bytes(*shape) for shape in shapes)
            # One collective that is cut into stages has its channel's number in each of them.
            channel = CHANNEL.search(line)
            each = (times[name], times[name] * size * RING[kind](_group(line)))
            key = kind, channel[1] if channel else own
            found[key] = max(found.get(key, each), each)
    return [
        Collective(
            kind,
            sum(n for (k, _), (n, _) in found.items() if k == kind),
            sum(sent for (k, _), (_, sent) in found.items() if k == kind),
        )
        for kind in sorted({kind for kind, _ in found})
    ]


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """{computation: its lines}, and the name of the one that the program starts with."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if not line.startswith(" ") and (head := COMPUTATION.match(line)):
            current = bodies.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        elif current is not None:
            current.append(line)
    return bodies, entry


def times_run(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """Count how often each computation runs."""
    times: dict[str, int] = defaultdict(int)

    def run(name: str, n: int) -> None:
        times[name] += n
        for line in bodies.get(name, []):
            loop = CONDITION.search(line)
            known = KNOWN_TRIPS.search(line)
            trips = int(known[1]) if known else _trips(bodies.get(loop[1], [])) if loop else 1
            for kind, several, one in CALLED.findall(line):
                for called in (several or one).split(", "):
                    run(called.lstrip("%"), n * trips if kind == "body" else n)

    run(entry, 1)
    return times


def _trips(condition: list[str]) -> int:
    """Read the trip count of a loop: the one number that its counter is compared with."""
    numbers = [int(n) for line in condition for n in CONSTANT.findall(line)]
    return max(numbers, default=1)


def _bytes(kind: str, shape: str) -> int:
    return int(bytes_of(kind) * math.prod(int(n) for n in shape.split(",") if n))


def bytes_of(kind: str) -> float:
    """Return the bytes of an element, by the bits in its type's name; 0 of what is no number."""
    bits = BITS.match(kind)
    return int(bits[1]) / 8 if bits else float(kind == "pred")


def _group(line: str) -> int:
    """Count the chips of a replica group, which has three notations."""
    if "replica_groups=" not in line:
        return 2
    # mesh['a'=16,'b'=4] {'a'}, also with an order of devices in between
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    raise ValueError(f"replica groups in a notation that is not known: {line.strip()}")
