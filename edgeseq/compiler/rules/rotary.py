"""RotaryEmbedding with one row of angles per token -> kernels/rotary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.rotary import Rotary
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    x, cos, sin = node.inputs[:3]
    heads = int(node.attrs.get("num_heads", 0))
    partial = int(node.attrs.get("rotary_embedding_dim", 0))
    if len(node.inputs) > 3 or len(graph.shape(x)) != 3 or not heads or partial:
        return None

    def emit() -> None:
        xv = low.rows(x)
        params = Rotary(xv.rows, heads, xv.cols // heads, xv.ld, bool(node.attrs.get("interleaved", 0)))
        args = (Arg(xv, "r"), Arg(low.dense(cos), "r"), Arg(low.dense(sin), "r"), Arg(low.result(node.outputs[0]), "w"))
        low.call(KernelRef("rotary", params), *args)

    return Claim((node,), (x, cos, sin), emit)


RULE = Rule(("RotaryEmbedding",), _match)
