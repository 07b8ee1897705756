"""com.microsoft.GatherBlockQuantized of rows of the table that MatMulNBits reads too -> kernels/embed_q."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels._quantise import BLOCK, blocks
from ..kernels.embed_q import EmbedQ
from ..kernels.linear_q import PAIR_BYTES
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    packed, tokens, scales, *more = node.inputs
    bits = int(node.attrs.get("bits", 4))
    if (
        bits not in (4, 8)
        or int(node.attrs.get("block_size", 128)) != BLOCK
        or any(more)
        or packed not in graph.weights
    ):
        return None
    out = node.outputs[0]
    if graph.dtype(out) != "float32" or int(node.attrs.get("gather_axis", 0)) != 0:
        return None

    def emit() -> None:
        m, k = graph.shape(packed)[0], graph.shape(out)[-1]
        t = math.prod(graph.shape(tokens))
        isa = low.target.dot
        w = low.weight_q(packed, scales, (m, k), bits, isa.signed)
        params = EmbedQ(t, m, k, bits, isa.signed)
        read = t * blocks(k) // 2 * PAIR_BYTES[bits] // 16
        args = (Arg(low.rows(tokens), "r"), Arg(w, "r"), Arg(w, "r"), Arg(low.result(out), "w"))
        low.call(KernelRef("embed_q", params), *args, weights=read)

    return Claim((node,), (tokens,), emit)


RULE = Rule(("com.microsoft.GatherBlockQuantized",), _match)
