"""Nodes that move no data: the output is a window of the input's memory."""

from __future__ import annotations

import math

from .graph import Graph, Node
from .ir import Value

VIEW_OPS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Transpose", "Slice", "Split")


def view_of(graph: Graph, node: Node, output: str, base: Value) -> Value | None:
    """`output` of a VIEW_OPS node as a window of `base`, or None when data must move."""
    shape = graph.shape(output)
    if node.op == "Slice":
        return _slice(graph, node, output, base)
    if node.op == "Split":
        return _split(graph, node, output, base)
    if node.op == "Transpose" and not _moves_only_ones(base.shape, node.attrs.get("perm")):
        return None
    if base.contiguous:
        return Value(output, base.dtype, shape, base.storage, base.offset)
    if shape[-1:] == base.shape[-1:] and math.prod(shape) == math.prod(base.shape):
        return Value(output, base.dtype, shape, base.storage, base.offset, base.ld)
    return None


def _moves_only_ones(shape: tuple[int, ...], perm: list[int] | None) -> bool:
    order = perm if perm is not None else list(range(len(shape)))[::-1]
    real = [axis for axis in order if shape[axis] != 1]
    return real == sorted(real)


def _slice(graph: Graph, node: Node, output: str, base: Value) -> Value | None:
    parts = [graph.constant(name) if name else None for name in node.inputs[1:]]
    if len(parts) < 2 or parts[0] is None or parts[1] is None:
        return None
    starts = parts[0].tolist()
    axes = parts[2].tolist() if len(parts) > 2 and parts[2] is not None else list(range(len(starts)))
    steps = parts[3].tolist() if len(parts) > 3 and parts[3] is not None else [1] * len(starts)
    if len(axes) != 1 or steps != [1]:
        return None
    axis = axes[0] % len(base.shape)
    start = min(max(starts[0] + (base.shape[axis] if starts[0] < 0 else 0), 0), base.shape[axis])
    return _window(base, output, graph.shape(output), axis, start)


def _split(graph: Graph, node: Node, output: str, base: Value) -> Value | None:
    axis = int(node.attrs.get("axis", 0)) % len(base.shape)
    before = node.outputs[: node.outputs.index(output)]
    return _window(base, output, graph.shape(output), axis, sum(graph.shape(o)[axis] for o in before))


def _window(base: Value, name: str, shape: tuple[int, ...], axis: int, start: int) -> Value | None:
    last = len(base.shape) - 1
    if axis == last:
        return Value(name, base.dtype, shape, base.storage, base.offset + start, base.ld)
    if math.prod(base.shape[:axis]) != 1:
        return None
    rows = math.prod(base.shape[axis + 1 : last])
    return Value(name, base.dtype, shape, base.storage, base.offset + start * rows * base.ld, base.ld)
