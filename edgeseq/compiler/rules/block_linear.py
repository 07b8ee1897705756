"""MatMul of [..,H,1,K] with a weight [H,K,M], each head with a matrix of its own, plus a bias of all heads
-> kernels/expert_linear, where every token has chosen every head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..graph import Weight
from ..ir import Arg, KernelRef, Value
from ..kernels.expert_linear import ExpertLinear
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    x, w = node.inputs
    weight, shape = graph.weights.get(w), graph.shape(x)
    if weight is None or len(weight.shape) != 3 or weight.dtype != "float32" or graph.dtype(x) != "float32":
        return None
    heads, k, m = weight.shape
    if len(shape) < 3 or shape[-3:] != (heads, 1, k):
        return None

    def emit() -> None:
        xv = low.rows(x)
        tokens = math.prod(shape[:-3])
        packed = Value(w, weight.dtype, weight.shape, low.memory.weight("experts.columns16", weight))
        params = ExpertLinear(T=tokens, A=heads, E=heads, M=m, K=k, S=heads, ldx=xv.ld)
        y = low.result(node.outputs[0])
        low.call(
            KernelRef("expert_linear", params),
            Arg(xv, "r"),
            *_routes(low, tokens, heads),
            Arg(packed, "r"),
            Arg(y, "w"),
        )

    return Claim((node,), (x,), emit)


def _routes(low: Lowering, tokens: int, heads: int) -> list[Arg]:
    """Head h has slot h of every token, as `expert_order` would sort them."""
    slots = np.arange(tokens * heads).reshape(tokens, heads).T
    if tokens == 1:
        return [_constant(low, f"heads.{heads}", slots.reshape(-1))]
    start = np.arange(heads + 1) * tokens
    name = f"heads.{heads}.of.{tokens}"
    return [
        _constant(low, f"{name}.order", slots.reshape(-1).astype(np.int32)),
        _constant(low, f"{name}.start", start.astype(np.int32)),
    ]


def _constant(low: Lowering, name: str, array: np.ndarray) -> Arg:
    source = Weight(name, str(array.dtype), array.shape, None, 0, np.ascontiguousarray(array))
    return Arg(Value(name, source.dtype, source.shape, low.memory.weight("plain", source)), "r")


RULE = Rule(("MatMul",), _match)
