"""com.microsoft.MatMulNBits (4 or 8 bits, blocks of 32, symmetric), bias and residual -> quantize + linear_q."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..epilogue import absorb
from ..ir import Arg, KernelRef
from ..kernels._quantise import BLOCK
from ..kernels.linear_q import LinearQ
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    x, packed, scales, *more = node.inputs
    bits = int(node.attrs.get("bits", 4))
    if bits not in (4, 8) or int(node.attrs["block_size"]) != BLOCK or any(more) or graph.dtype(x) != "float32":
        return None
    if packed not in graph.weights or scales not in graph.weights:
        return None
    m, k = int(node.attrs["N"]), int(node.attrs["K"])
    after = absorb(graph, node.outputs[0], taken=low.taken)

    def emit() -> None:
        isa = low.target.dot
        w = low.weight_q(packed, scales, (m, k), bits, isa.signed)
        q, scale, offset = low.quantized(x, isa.zero(bits))
        rv = low.rows(after.residual) if after.residual else None
        y = low.result(after.out)
        params = LinearQ(
            T=math.prod(graph.shape(x)[:-1]), M=m, K=k, bits=bits, isa=isa.name, bias=bool(after.bias),
            residual=rv is not None, ldr=rv.ld if rv else 0, tile=isa.tile, streams=low.target.streams,
            ahead=low.target.ahead,
        )  # fmt: skip
        optional = [Arg(low.weight(after.bias, "plain"), "r")] if after.bias else []
        optional += [Arg(rv, "r")] if rv else []
        low.call(
            KernelRef("linear_q", params), Arg(q, "r"), Arg(scale, "r"), Arg(offset, "r"), Arg(w, "r"), Arg(w, "r"),
            *optional, Arg(y, "w"), weights=w.storage.nbytes + (4 * m if after.bias else 0),
        )  # fmt: skip

    return Claim((node, *after.nodes), (x, *((after.residual,) if after.residual else ())), emit)


RULE = Rule(("com.microsoft.MatMulNBits",), _match)
