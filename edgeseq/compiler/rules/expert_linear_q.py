"""ai.edgeseq.ExpertLinearNBits, and the residual after its sum -> quantize + kernels/expert_linear_q."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.expert_linear_q import ExpertLinearQ
from . import Claim, Rule
from .expert_linear import after_sum, chosen_bytes, routing, sum_operands

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    x, index, codes, scales, *more = node.inputs
    if codes not in graph.weights or scales not in graph.weights:
        return None
    gates = more[0] if more else ""
    after = after_sum(low, node, gates)

    def emit() -> None:
        experts, bits = int(node.attrs.get("num_experts", 1)), int(node.attrs.get("bits", 4))
        isa = low.target.dot
        matrices = low.expert_weight_q(codes, scales, experts, bits, isa.signed)
        rounded = low.quantized(x, isa.zero(bits))
        routes = routing(low, index, experts)
        extra, residual = sum_operands(low, gates, after)
        (tokens, slots), (_, _, inputs, k) = graph.shape(index)[-2:], graph.shape(x)
        params = ExpertLinearQ(
            T=math.prod(graph.shape(index)[:-1]), A=slots, E=experts, M=graph.shape(codes)[0] // experts, K=k,
            S=inputs, bits=bits, isa=isa.name, gates=bool(gates), residual=residual is not None,
            ldr=residual.ld if residual else 0,
        )  # fmt: skip
        y, w = low.result(after.out), Arg(matrices, "r")
        low.call(
            KernelRef("expert_linear_q", params), *(Arg(v, "r") for v in rounded), *routes, w, w, *extra, Arg(y, "w"),
            weights=chosen_bytes(matrices, experts, tokens * slots),
        )  # fmt: skip

    needs = (x, index, gates, after.residual)
    return Claim((node, *after.nodes), tuple(n for n in needs if n), emit)


RULE = Rule(("ai.edgeseq.ExpertLinearNBits",), _match)
