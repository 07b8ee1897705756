"""The pass that turns matrices into block-quantised ones, on a tidy graph of any family.

    MatMul(x, Transpose(W))   ->  com.microsoft.MatMulNBits(x, W.codes, W.scales)
    Gather(W, tokens)         ->  com.microsoft.GatherBlockQuantized(W.rows, tokens, W.scales)
    ExpertLinear(x, index, W) ->  ai.edgeseq.ExpertLinearNBits(x, index, W.codes, W.scales)

W.codes and W.rows are two shapes of the same bytes, so a table that is looked up and multiplied with is stored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgeseq.ops import DOMAIN, all_ops
from exporters import contrib
from exporters.rounding import BLOCK, blocks
from exporters.tidy import attach_functions, weights

MIN_WIDTH = 64  # K below which a row is one block: nothing to gain
MIN_SIZE = 4096  # elements below which scales and padding eat what is won
HEAD_SHARE = 0.05
"""The output head of a 4-bit model gets 8 bits where that makes the matrices at most this much larger: what it rounds
off goes into the scores unfiltered."""

DECAYS = {"dt", "g", "decay", "log_a", "log_decay"}
"""Inputs of recurrences that stand in an exponent: an error there grows with every token."""

STANDARD_DECAYS = {"LinearAttention": 4}
CHOICES = {"TopK", "ArgMax", "Softmax"}
"""A product that ends in one of these chooses (a router): near ties must not be decided by rounding."""

PASSES_ON = {
    "Abs", "Add", "Cast", "Clip", "Concat", "Div", "Exp", "Expand", "Identity", "Log", "Max", "Min", "Mul", "Neg",
    "Reshape", "Sigmoid", "Slice", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True)
class Quantised:
    """One matrix [M,K] of the source and the tensors that stand for it."""

    name: str
    shape: tuple[int, int]
    bits: int

    @property
    def codes(self) -> str:
        return f"{self.name}.codes"

    @property
    def scales(self) -> str:
        return f"{self.name}.scales"

    @property
    def rows(self) -> str:
        return f"{self.name}.rows"


def quantise_graph(model: ir.Model, bits: int) -> dict[str, Quantised]:
    """Replace every product and lookup whose matrix may be rounded; returns those matrices by name."""
    chosen = {value: _shape(value) for value in weights(model.graph) if may_round(value)}
    total = sum(m * k for m, k in chosen.values())
    found = {}
    for value, (m, k) in chosen.items():
        finer = bits == 4 and _is_head(value) and m * k * 4 <= HEAD_SHARE * total * (4 + 16 / BLOCK)
        found[value.name or ""] = _replace(
            model.graph, value, Quantised(value.name or "", (m, k), 8 if finer else bits)
        )
    if any(node.domain == contrib.DOMAIN for node in model.graph):
        model.opset_imports[contrib.DOMAIN] = 1
    attach_functions(model)
    return found


def may_round(weight: ir.Value) -> bool:
    """The rule: a float matrix that only feeds products and lookups, wide and large enough, and not sensitive."""
    shape = _shape(weight)
    if len(shape) != 2 or weight.dtype != ir.DataType.FLOAT or shape[1] < MIN_WIDTH or shape[0] * shape[1] < MIN_SIZE:
        return False
    for use in weight.uses():
        if use.node.op_type == "Gather":
            axis = use.node.attributes.get_int("axis", 0)
            if use.idx != 0 or axis != 0 or shape[1] % BLOCK:  # a lookup has no way to leave out the padding
                return False
            continue
        products = [use.node] if is_expert_matrix(use) else []
        products = _products(use.node) if use.node.op_type == "Transpose" else products
        if not products or any(map(_sensitive, products)):
            return False
    return bool(weight.uses())


def _shape(weight: ir.Value) -> tuple[int, ...]:
    return tuple(int(size) for size in weight.shape or ())


def _is_head(weight: ir.Value) -> bool:
    """Whether a product with it is an output of the graph, with or without a bias."""
    products = [p for use in weight.uses() if use.node.op_type == "Transpose" for p in _products(use.node)]
    results = [p.outputs[0] for p in products]
    results += [use.node.outputs[0] for value in results for use in value.uses() if use.node.op_type == "Add"]
    return any(value.is_graph_output() for value in results)


def is_expert_matrix(use: ir.Usage) -> bool:
    """Whether a weight is read as the matrices of experts."""
    return (use.node.domain, use.node.op_type, use.idx) == (DOMAIN, "ExpertLinear", 2)


def _products(transpose: ir.Node) -> list[ir.Node]:
    """The MatMuls that read a transposed weight as their right side, or none if anything else reads it."""
    uses = list(transpose.outputs[0].uses())
    return [u.node for u in uses] if all(u.node.op_type == "MatMul" and u.idx == 1 for u in uses) else []


def _sensitive(product: ir.Node) -> bool:
    """Whether all that a product computes ends in the decay of a recurrence or in a choice."""
    ends = list(_ends(product.outputs[0], set()))
    return bool(ends) and all(_is_sensitive_end(end) for end in ends)


def _ends(value: ir.Value, seen: set[ir.Value]) -> Iterator[ir.Usage]:
    """Readers of `value` behind elementwise and shape operators."""
    if value in seen:
        return
    seen.add(value)
    for use in value.uses():
        if not use.node.domain and use.node.op_type in PASSES_ON:
            for output in use.node.outputs:
                yield from _ends(output, seen)
        else:
            yield use


def _is_sensitive_end(use: ir.Usage) -> bool:
    op = all_ops().get(use.node.op_type)
    if op is not None and op.domain == use.node.domain:
        return op.inputs[use.idx].name in DECAYS
    return use.node.op_type in CHOICES or STANDARD_DECAYS.get(use.node.op_type) == use.idx


def _replace(graph: ir.Graph, weight: ir.Value, q: Quantised) -> Quantised:
    m, k = q.shape
    n = blocks(k)
    codes = _initializer(graph, q.codes, ir.DataType.UINT8, (m, n, 4 * q.bits))
    scales = _initializer(graph, q.scales, ir.DataType.FLOAT, (m, n))
    for use in list(weight.uses()):
        if use.node.op_type == "Gather":
            rows = graph.initializers.get(q.rows)
            rows = rows or _initializer(graph, q.rows, ir.DataType.UINT8, (m, k * q.bits // 8))
            inputs = [rows, use.node.inputs[1], scales]
            options = {"bits": q.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
            _swap(graph, use.node, "GatherBlockQuantized", inputs, options)
            continue
        if is_expert_matrix(use):
            x, index, _, *gates = use.node.inputs
            experts = {"num_experts": use.node.attributes.get_int("num_experts", 1), "bits": q.bits}
            _swap(graph, use.node, "ExpertLinearNBits", [x, index, codes, scales, *gates], experts, DOMAIN)
            continue
        for product in _products(use.node):
            options = {"K": k, "N": m, "bits": q.bits, "block_size": BLOCK}
            _swap(graph, product, "MatMulNBits", [product.inputs[0], codes, scales], options)
        graph.remove(use.node, safe=True)
    assert weight.name is not None
    del graph.initializers[weight.name]
    return q


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.initializers.add(value)
    return value


def _swap(
    graph: ir.Graph,
    old: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    options: Mapping[str, int],
    domain: str = contrib.DOMAIN,
) -> None:
    """Put another node in the place of `old`; its result keeps name, type and readers."""
    new = ir.node(op, inputs, dict(options), domain=domain, name=old.name)
    was, now = old.outputs[0], new.outputs[0]
    now.name, now.type, now.shape = was.name, was.type, was.shape
    graph.insert_before(old, new)
    was.replace_all_uses_with(now, replace_graph_outputs=True)
    graph.remove(old, safe=True)
