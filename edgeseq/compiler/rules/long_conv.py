"""ai.edgeseq.LongConvStep -> kernels/long_conv, history in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from ..ir import Arg, KernelRef
from ..kernels.long_conv import LongConv
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    x, h, d, past, position = node.inputs
    y, present = node.outputs
    if any(name and name not in low.graph.weights for name in (h, d)):
        return None
    if not low.owns_state(past, present, (node,)):
        raise CompileError(f"{node.proto.name}: its history is read elsewhere", "a long convolution appends in place")

    def emit() -> None:
        xv = low.rows(x)
        taps, rows = low.graph.shape(h)[0], low.graph.shape(past)[1]
        params = LongConv(T=xv.rows, C=xv.cols, L=taps, M=rows, ldx=xv.ld, skip=bool(d))
        args = [Arg(xv, "r"), Arg(low.columns(h), "r")]
        args += [Arg(low.weight(d, "plain"), "r")] if d else []
        args += [Arg(low.state(past, present), "rw"), Arg(low.rows(position), "r"), Arg(low.result(y), "w")]
        row = 4 * xv.cols
        # each position in reach reads a row of the history and a row of the filter
        traffic = {"state": xv.rows * row, "kv": 2 * row, "weights": row if d else 0}
        if taps < rows:
            traffic["kv_rows"] = taps
        low.call(KernelRef("long_conv", params), *args, **traffic)

    return Claim((node,), (x, position, past), emit)


RULE = Rule(("ai.edgeseq.LongConvStep",), _match)
