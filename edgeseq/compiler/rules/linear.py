"""MatMul or Gemm with a weight, plus the bias and the residual that follow it -> kernels/linear."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.linear import Linear
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering

FLOATS = ("float32", "float16", "bfloat16")


def _weight(low: Lowering, name: str, transposed: bool) -> tuple[str, str] | None:
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


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    if graph.dtype(node.outputs[0]) != "float32":
        return None
    gemm = node.op == "Gemm"
    if gemm and (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0), node.attrs.get("transA", 0)) != (1.0, 1.0, 0):
        return None
    found = _weight(low, node.inputs[1], bool(node.attrs.get("transB", 0)))
    if found is None:
        return None
    weight, layout = found
    x, out, claimed = node.inputs[0], node.outputs[0], [node]
    m = graph.shape(out)[-1]
    bias = node.inputs[2] if gemm and len(node.inputs) > 2 else ""
    residual = ""
    if bias and graph.shape(bias) != (m,):
        return None
    while (add := graph.sole_consumer(out)) is not None and add.op == "Add":
        other = add.inputs[1] if add.inputs[0] == out else add.inputs[0]
        if not bias and not residual and other in graph.weights and graph.shape(other) == (m,):
            bias = other
        elif not residual and other not in graph.weights and graph.types[other] == graph.types[out]:
            residual = other
        else:
            break
        claimed.append(add)
        out = add.outputs[0]
        if residual:
            break

    def emit() -> None:
        xv = low.rows(x)
        rv = low.rows(residual) if residual else None
        w = low.weight(weight, layout)
        y = low.result(out)
        params = Linear(
            T=math.prod(graph.shape(x)[:-1]), M=m, K=xv.cols, ldx=xv.ld, wdtype=w.dtype, bias=bool(bias),
            residual=rv is not None, ldr=rv.ld if rv else 0, tile=low.target.gemm_tile,
        )  # fmt: skip
        optional = [Arg(low.weight(bias, "plain"), "r")] if bias else []
        optional += [Arg(rv, "r")] if rv else []
        low.call(KernelRef("linear", params), Arg(xv, "r"), Arg(w, "r"), *optional, Arg(y, "w"))

    return Claim(tuple(claimed), (x, *((residual,) if residual else ())), emit)


RULE = Rule(("MatMul", "Gemm"), _match)
