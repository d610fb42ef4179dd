"""Darknet models (`.cfg` and `.weights`) as ONNX graphs.

Reads what YOLOv4-tiny and its kin are made of: convolutional (leaky or linear), maxpool, route,
upsample and yolo sections. Source of the format: AlexeyAB/darknet `parser.c`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HEADER = 20  # bytes before the weights: three int32 of version, an int64 of images seen
EPSILON = 1e-6  # in Darknet's batch norm
SLOPE = 0.1  # of its leaky activation


class Head(NamedTuple):
    """A yolo section: how the output of that name, f32 [B, A x (5 + classes), h, w], is read."""

    output: str
    anchors: np.ndarray  # f32 [A, 2], width and height in px of the network's input
    classes: int
    stretch: float  # scale_x_y: how far a centre may leave its cell


Section = tuple[str, dict[str, str]]


def sections(text: str) -> list[Section]:
    """A cfg's sections, in order: (name, its settings)."""
    found: list[Section] = []
    for line in (raw.split("#")[0].strip() for raw in text.splitlines()):
        if line.startswith("["):
            found.append((line.strip("[]"), {}))
        elif line:
            key, _, value = line.partition("=")
            found[-1][1][key.strip()] = value.strip()
    if not found or found[0][0] not in ("net", "network"):
        raise ValueError(
            "a Darknet cfg begins with a [net] section, and this one does not: give another .cfg"
        )
    return found


def to_onnx(cfg: Path, weights: Path) -> tuple[Any, list[Head], tuple[int, int]]:
    """The model as (onnx.ModelProto, its heads, (height, width) of its input in px).

    The graph's input is `images`, f32 [B, 3, height, width], 0 to 1, red first.

    Raises ValueError for a section that is not supported, or weights that do not fit the cfg.
    """
    from onnx import TensorProto, helper

    (_, net), *layers = sections(cfg.read_text())
    size = int(net["height"]), int(net["width"])
    graph = _Graph(np.frombuffer(weights.read_bytes()[HEADER:], "<f4"), int(net["channels"]))
    for kind, settings in layers:
        if kind not in _KINDS:
            raise ValueError(f"{cfg}: no support for [{kind}], only for {', '.join(_KINDS)}")
        _KINDS[kind](graph, settings)
    if graph.read != len(graph.numbers):
        raise ValueError(
            f"{cfg} needs {graph.read} weights, {weights} has {len(graph.numbers)}: give the two"
            " files of one network"
        )
    shape: list[str | int | None] = ["batch", int(net["channels"]), *size]
    described = helper.make_graph(
        graph.nodes,
        cfg.stem,
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(h.output, TensorProto.FLOAT, None) for h in graph.heads],
        graph.tensors,
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(described, opset_imports=[opset], ir_version=8), graph.heads, size


class _Graph:
    """The graph so far. `outputs[i]` is section i's output: (name, channels)."""

    def __init__(self, numbers: np.ndarray, channels: int) -> None:
        self.numbers, self.read = numbers, 0
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.heads: list[Head] = []
        self.outputs: list[tuple[str, int]] = []
        self.last = ("images", channels)

    def take(self, *shape: int) -> np.ndarray:
        """The next weights of the file."""
        start, self.read = self.read, self.read + int(np.prod(shape))
        if self.read > len(self.numbers):
            raise ValueError(
                f"the weights end after {len(self.numbers)} numbers, more are needed: give the"
                " .weights that belong to the .cfg, whole"
            )
        return self.numbers[start : self.read].reshape(shape)

    def constant(self, value: np.ndarray) -> str:
        """The name of a constant."""
        from onnx import numpy_helper

        name = f"constant{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The output's name of a new node."""
        from onnx import helper

        name = f"node{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def end(self, name: str, channels: int) -> None:
        """A section ends with this output."""
        self.last = (name, channels)
        self.outputs.append(self.last)


def _convolutional(graph: _Graph, s: dict[str, str]) -> None:
    name, channels = graph.last
    filters, size, groups = int(s["filters"]), int(s["size"]), int(s.get("groups", 1))
    bias = graph.take(filters)
    scale: np.ndarray = np.ones(filters, np.float32)
    if int(s.get("batch_normalize", 0)):  # folded into the convolution
        scale, mean, variance = graph.take(filters), graph.take(filters), graph.take(filters)
        scale = scale / np.sqrt(variance + EPSILON)
        bias = bias - mean * scale
    kernel = graph.take(filters, channels // groups, size, size) * scale[:, None, None, None]
    pad = size // 2 if int(s.get("pad", 0)) else int(s.get("padding", 0))
    name = graph.node(
        "Conv",
        name,
        graph.constant(kernel),
        graph.constant(bias),
        strides=[int(s.get("stride", 1))] * 2,
        pads=[pad] * 4,
        group=groups,
    )
    if s["activation"] == "leaky":
        name = graph.node("LeakyRelu", name, alpha=SLOPE)
    elif s["activation"] != "linear":
        raise ValueError(f"activation={s['activation']} is not supported, only leaky and linear")
    graph.end(name, filters)


def _maxpool(graph: _Graph, s: dict[str, str]) -> None:
    name, channels = graph.last
    size = int(s["size"])
    before, after = (size - 1) // 2, size // 2  # Darknet pads size - 1 px, the odd one at the end
    name = graph.node(
        "MaxPool",
        name,
        kernel_shape=[size] * 2,
        strides=[int(s.get("stride", 1))] * 2,
        pads=[before, before, after, after],
    )
    graph.end(name, channels)


def _route(graph: _Graph, s: dict[str, str]) -> None:
    parts = [graph.outputs[int(i)] for i in s["layers"].split(",")]  # negative: counted from here
    groups, group = int(s.get("groups", 1)), int(s.get("group_id", 0))
    names = []
    for name, channels in parts:
        if groups > 1:
            each = channels // groups
            bounds = [graph.constant(np.array([i * each])) for i in (group, group + 1)]
            name = graph.node("Slice", name, *bounds, graph.constant(np.array([1])))
        names.append(name)
    joined = names[0] if len(names) == 1 else graph.node("Concat", *names, axis=1)
    graph.end(joined, sum(channels for _, channels in parts) // groups)


def _upsample(graph: _Graph, s: dict[str, str]) -> None:
    name, channels = graph.last
    factor = int(s.get("stride", 2))
    scales = graph.constant(np.array([1, 1, factor, factor], np.float32))
    how = dict(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    graph.end(graph.node("Resize", name, "", scales, **how), channels)


def _yolo(graph: _Graph, s: dict[str, str]) -> None:
    anchors = np.array(s["anchors"].split(","), np.float32).reshape(-1, 2)
    mask = [int(i) for i in s["mask"].split(",")]
    name, channels = graph.last
    classes = int(s["classes"])
    if channels != len(mask) * (5 + classes):
        raise ValueError(f"[yolo] of {len(mask)} anchors, {classes} classes has {channels} inputs")
    graph.heads.append(Head(name, anchors[mask], classes, float(s.get("scale_x_y", 1))))
    graph.end(name, channels)


_KINDS: dict[str, Callable[[_Graph, dict[str, str]], None]] = {
    "convolutional": _convolutional,
    "maxpool": _maxpool,
    "route": _route,
    "upsample": _upsample,
    "yolo": _yolo,
}
