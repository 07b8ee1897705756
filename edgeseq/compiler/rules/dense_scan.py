"""ai.edgeseq.DenseScan -> kernels/dense_scan, state in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from ..ir import Arg, KernelRef
from ..kernels.dense_scan import DenseScan
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    u, a, b, c, d, past = node.inputs
    y, present = node.outputs
    if any(name and name not in low.graph.weights for name in (a, b, c, d)):
        return None
    if not low.owns_state(past, present, (node,)):
        raise CompileError(f"{node.proto.name}: its state is read elsewhere", "a scan updates its state in place")

    def emit() -> None:
        uv = low.rows(u)
        params = DenseScan(T=uv.rows, C=uv.cols, N=low.graph.shape(b)[0], ldu=uv.ld, skip=bool(d))
        args = [Arg(uv, "r"), *(Arg(low.columns(name), "r") for name in (a, b, c))]
        args += [Arg(low.weight(d, "plain"), "r")] if d else []
        args += [Arg(low.state(past, present), "rw"), Arg(low.result(y), "w")]
        low.call(KernelRef("dense_scan", params), *args)

    return Claim((node,), (u, past), emit)


RULE = Rule(("ai.edgeseq.DenseScan",), _match)
