"""Mul(Mul(g, Sigmoid(g)), u) -> kernels/glu."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.glu import Glu
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    g = node.inputs[0]
    gate = graph.sole_consumer(node.outputs[0])
    if (
        gate is None
        or gate.op != "Mul"
        or g not in gate.inputs
        or graph.dtype(g) != "float32"
        or len(graph.shape(g)) < 2
    ):
        return None
    product = graph.sole_consumer(gate.outputs[0])
    if product is None or product.op != "Mul":
        return None
    u = next((i for i in product.inputs if i != gate.outputs[0]), "")
    if not u or graph.types[u] != graph.types[g] or u in graph.weights:
        return None
    y = product.outputs[0]

    def emit() -> None:
        gv, uv = low.rows(g), low.rows(u)
        params = Glu(gv.rows, gv.cols, gv.ld, uv.ld)
        low.call(KernelRef("glu", params), Arg(gv, "r"), Arg(uv, "r"), Arg(low.result(y), "w"))

    return Claim((node, gate, product), (g, u), emit)


RULE = Rule(("Sigmoid",), _match)
