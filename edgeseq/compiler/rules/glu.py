"""Mul(Mul(g, Sigmoid(g)), u) -> kernels/glu."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.glu import Glu
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Graph, Node
    from ..lowering import Lowering


def gated(graph: Graph, sigmoid: Node) -> tuple[str, str, tuple[Node, ...]] | None:
    """(g, u, nodes) of u * (g * sigmoid(g)), both computed rows of one type; nobody else reads what is between."""
    g = sigmoid.inputs[0]
    gate = graph.sole_consumer(sigmoid.outputs[0])
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
    return g, u, (sigmoid, gate, product)


def _match(low: Lowering, node: Node) -> Claim | None:
    found = gated(low.graph, node)
    if found is None:
        return None
    g, u, nodes = found

    def emit() -> None:
        gv, uv = low.rows(g), low.rows(u)
        params = Glu(gv.rows, gv.cols, gv.ld, uv.ld)
        low.call(KernelRef("glu", params), Arg(gv, "r"), Arg(uv, "r"), Arg(low.result(nodes[-1].outputs[0]), "w"))

    return Claim(nodes, (g, u), emit)


RULE = Rule(("Sigmoid",), _match)
