"""Attention over [ring; new rows] with the window's mask, then a circular TensorScatter of K and V
-> kernels/cached_attention, ring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Claim, Rule
from .cached_attention import _flat_heads, _merged, attend

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering

LARGEST_CONSTANT = 1 << 20


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    q4, keys, values, mask, *rest = (*node.inputs, "")
    if not mask or any(rest) or node.attrs.get("is_causal") or node.attrs.get("softcap"):
        return None
    ring_k, ring_v = _ring(low, keys), _ring(low, values)
    if ring_k is None or ring_v is None:
        return None
    (past_k, k4, concat_k, scatter_k), (past_v, v4, concat_v, scatter_v) = ring_k, ring_v
    if past_k == past_v or scatter_k.inputs[2] != scatter_v.inputs[2]:
        return None
    tokens, rows = graph.shape(q4)[2], graph.shape(past_k)[2]
    position = _position(low, scatter_k.inputs[2], tokens, rows)
    if position is None or _tree(low, mask) != _window(position, tokens, rows):
        return None
    q, k, v = (_flat_heads(low, n) for n in (q4, k4, v4))
    merged = _merged(low, node.outputs[0])
    if q is None or k is None or v is None or merged is None:
        return None
    claimed = (concat_k, concat_v, scatter_k, scatter_v, node, *merged)
    present_k, present_v = scatter_k.outputs[0], scatter_v.outputs[0]
    if any(graph.sole_consumer(c.outputs[0]) is not node for c in (concat_k, concat_v)):
        return None
    slices = tuple(graph.producer[s.inputs[1]] for s in (scatter_k, scatter_v) if s.inputs[1] not in (k4, v4))
    claimed += tuple(s for s in slices if graph.sole_consumer(s.outputs[0]) is not None)
    if not (low.owns_state(past_k, present_k, claimed) and low.owns_state(past_v, present_v, claimed)):
        return None

    def emit() -> None:
        heads, scale = graph.shape(q4)[1], float(node.attrs.get("scale", graph.shape(q4)[3] ** -0.5))
        names = (q, k, v, past_k, present_k, past_v, present_v, position, merged[-1].outputs[0])
        attend(low, names, heads, scale, ring=True)

    return Claim(claimed, (q, k, v, position, past_k, past_v), emit)


def _ring(low: Lowering, name: str) -> tuple[str, str, Node, Node] | None:
    """(past, new rows, the concatenation, the circular scatter of the last rows) of keys or values."""
    graph = low.graph
    concat = graph.producer.get(name)
    if concat is None or concat.op != "Concat" or len(concat.inputs) != 2 or concat.attrs.get("axis") not in (2, -2):
        return None
    past, new = concat.inputs
    scatter = next((n for n in graph.consumers.get(past, []) if n.op == "TensorScatter" and n.inputs[0] == past), None)
    if scatter is None or scatter.attrs.get("mode") != "circular" or scatter.attrs.get("axis", -2) not in (2, -2):
        return None
    tokens, rows = graph.shape(new)[2], graph.shape(past)[2]
    first = tokens - rows
    if len(scatter.inputs) != 3 or (first <= 0 and scatter.inputs[1] != new):
        return None
    ends = [_numbers(n) for n in ([first], [tokens], [2])]
    if first > 0 and _tree(low, scatter.inputs[1]) not in (
        ("Slice", new, *ends),
        ("Slice", new, *ends, _numbers([1])),
    ):
        return None
    return past, new, concat, scatter


def _position(low: Lowering, row: str, tokens: int, rows: int) -> str | None:
    """The position whose (position + max(0, tokens - rows)) mod rows is `row`."""
    tree, first = _tree(low, row), max(0, tokens - rows)
    if not isinstance(tree, tuple) or tree[0] != "Mod" or tree[2] != _numbers([rows]):
        return None
    base = tree[1]
    if first:
        if not isinstance(base, tuple) or base[0] != "Add" or base[2] != _numbers([first]):
            return None
        base = base[1]
    return base if isinstance(base, str) else None


def _window(position: str, tokens: int, rows: int) -> object:
    """The mask bool [T,W+T] that lets token t of a chunk see the last `rows` tokens, as `_tree` writes it."""
    t = range(tokens)
    back = ("Mod", ("Sub", position, _numbers(range(1, rows + 1))), _numbers([rows]))
    column = ("Concat", ("Sub", _numbers([-1]), back), _numbers(t))
    oldest = ("Max", _numbers([i - rows + 1 for i in t], (tokens, 1)), ("Neg", position))
    return ("And", ("LessOrEqual", column, _numbers(t, (tokens, 1))), ("GreaterOrEqual", column, oldest))


EXPECTED = ("And", "LessOrEqual", "GreaterOrEqual", "Concat", "Sub", "Mod", "Max", "Neg", "Add", "Slice")


def _tree(low: Lowering, name: str) -> object:
    """How `name` is computed: (operator, inputs…), whole-number constants by value, everything else by name."""
    weight = low.graph.weights.get(name)
    if weight is not None and weight.dtype == "int64" and int(np.prod(weight.shape)) <= LARGEST_CONSTANT:
        return _numbers(np.asarray(weight.load()), weight.shape)
    node = low.graph.producer.get(name)
    if node is None or node.op not in EXPECTED or node.attrs.get("fmod"):
        return name
    return (node.op, *(_tree(low, n) for n in node.inputs))


def _numbers(values: object, shape: tuple[int, ...] | None = None) -> object:
    array = np.asarray(values, np.int64).reshape(-1)
    return ("numbers", shape or array.shape, array.tobytes())


RULE = Rule(("Attention",), _match)
