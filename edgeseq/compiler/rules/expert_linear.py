"""ai.edgeseq.ExpertLinear, and the residual after its sum -> kernels/expert_linear; a chunk's slots sorted once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..epilogue import Epilogue, absorb
from ..ir import Arg, KernelRef, Value
from ..kernels.expert_linear import ExpertLinear
from ..kernels.expert_order import ExpertOrder
from . import Claim, Rule
from .linear import FLOATS

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    x, index, w, *more = node.inputs
    while w in graph.producer and graph.producer[w].op == "Cast":
        w = graph.producer[w].inputs[0]
    if w not in graph.weights or graph.dtype(w) not in FLOATS:
        return None
    gates = more[0] if more else ""
    after = after_sum(low, node, gates)

    def emit() -> None:
        experts = int(node.attrs.get("num_experts", 1))
        rows, k = graph.shape(w)
        xv, matrices = low.rows(x), low.expert_weight(w, experts)
        routes = routing(low, index, experts)
        extra, residual = sum_operands(low, gates, after)
        (tokens, slots), inputs = graph.shape(index)[-2:], graph.shape(x)[2]
        params = ExpertLinear(
            T=math.prod(graph.shape(index)[:-1]), A=slots, E=experts, M=rows // experts, K=k, S=inputs, ldx=xv.ld,
            wdtype=matrices.dtype, gates=bool(gates), residual=residual is not None, ldr=residual.ld if residual else 0,
        )  # fmt: skip
        y = low.result(after.out)
        low.call(
            KernelRef("expert_linear", params), Arg(xv, "r"), *routes, Arg(matrices, "r"), *extra, Arg(y, "w"),
            weights=chosen_bytes(matrices, experts, tokens * slots),
        )  # fmt: skip

    needs = (x, index, gates, after.residual)
    return Claim((node, *after.nodes), tuple(n for n in needs if n), emit)


def after_sum(low: Lowering, node: Node, gates: str) -> Epilogue:
    """The residual behind a sum; nothing follows outputs that are still apart."""
    out = node.outputs[0]
    if not gates:
        return Epilogue((), out, "", "")
    found = absorb(low.graph, out, taken=low.taken)
    return found if not found.bias else Epilogue((), out, "", "")


def routing(low: Lowering, index: str, experts: int) -> list[Arg]:
    """The choice of one token as it is; of a chunk, its slots by expert, sorted once for all products that use them."""
    value = low.dense(index)
    if math.prod(value.shape[:-1]) == 1:
        return [Arg(value, "r")]

    def sort() -> tuple[Value, ...]:
        slots = math.prod(value.shape)
        order = low.scratch(f"{index}.order", "int32", (slots,))
        start = low.scratch(f"{index}.start", "int32", (experts + 1,))
        params = ExpertOrder(slots, experts)
        low.call(KernelRef("expert_order", params), Arg(value, "r"), Arg(order, "w"), Arg(start, "w"))
        return order, start

    return [Arg(v, "r") for v in low.once(("expert_order", index), sort)]


def sum_operands(low: Lowering, gates: str, after: Epilogue) -> tuple[list[Arg], Value | None]:
    residual = low.rows(after.residual) if after.residual else None
    args = [Arg(low.dense(gates), "r")] if gates else []
    return args + ([Arg(residual, "r")] if residual else []), residual


def chosen_bytes(matrices: Value, experts: int, slots: int) -> int:
    """Bytes of the experts that `slots` choices can reach, each read once."""
    return matrices.storage.nbytes // experts * min(experts, slots)


RULE = Rule(("ai.edgeseq.ExpertLinear",), _match)
