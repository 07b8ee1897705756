"""MatMul or Gemm with a weight, plus the bias and the residual that follow it -> kernels/linear."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..epilogue import absorb
from ..ir import Arg, KernelRef
from ..kernels.linear import Linear
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering

FLOATS = ("float32", "float16", "bfloat16")


def linear_weight(low: Lowering, name: str, transposed: bool) -> tuple[str, str] | None:
    """(initializer, layout) behind an optional Transpose and Cast, or None."""
    graph = low.graph
    while name in graph.producer:
        node = graph.producer[name]
        if node.op == "Transpose" and node.attrs.get("perm") == [1, 0]:
            transposed = not transposed
        elif node.op != "Cast" or graph.dtype(name) != "float32":
            return None
        name = node.inputs[0]
    weight = graph.weights.get(name)
    if weight is None or len(weight.shape) != 2 or weight.dtype not in FLOATS:
        return None
    return name, "rows16" if transposed else "columns16"


def _plain_gemm(node: Node) -> bool:
    return (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0), node.attrs.get("transA", 0)) == (1.0, 1.0, 0)


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    gemm = node.op == "Gemm"
    found = linear_weight(low, node.inputs[1], bool(node.attrs.get("transB", 0)))
    if found is None or graph.dtype(node.outputs[0]) != "float32" or (gemm and not _plain_gemm(node)):
        return None
    weight, layout = found
    x, m = node.inputs[0], graph.shape(node.outputs[0])[-1]
    own_bias = node.inputs[2] if gemm and len(node.inputs) > 2 else ""
    if own_bias and (own_bias not in graph.weights or graph.shape(own_bias) != (m,)):
        return None
    after = absorb(graph, node.outputs[0], own_bias, low.taken)

    def emit() -> None:
        xv, w = low.rows(x), low.weight(weight, layout)
        rv = low.rows(after.residual) if after.residual else None
        y = low.result(after.out)
        params = Linear(
            T=math.prod(graph.shape(x)[:-1]), M=m, K=xv.cols, ldx=xv.ld, wdtype=w.dtype, bias=bool(after.bias),
            residual=rv is not None, ldr=rv.ld if rv else 0, tile=low.target.gemm_tile,
            streams=low.target.streams, ahead=low.target.ahead,
            chains=low.target.chains,
        )  # fmt: skip
        optional = [Arg(low.weight(after.bias, "plain"), "r")] if after.bias else []
        optional += [Arg(rv, "r")] if rv else []
        low.call(KernelRef("linear", params), Arg(xv, "r"), Arg(w, "r"), *optional, Arg(y, "w"))

    return Claim((node, *after.nodes), (x, *((after.residual,) if after.residual else ())), emit)


RULE = Rule(("MatMul", "Gemm"), _match)
