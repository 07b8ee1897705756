"""ai.edgeseq.DiagScan -> kernels/diag_scan, state in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from ..ir import Arg, KernelRef
from ..kernels.diag_scan import DiagScan
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    u, a, c, d, past = node.inputs
    y, present = node.outputs
    if any(name and name not in low.graph.weights for name in (a, c, d)):
        return None
    if not low.owns_state(past, present, (node,)):
        raise CompileError(f"{node.proto.name}: its state is read elsewhere", "a scan updates its state in place")

    def emit() -> None:
        uv = low.rows(u)
        modes, _, poles = low.graph.shape(a)
        shared = poles == 1 and uv.cols > 1
        params = DiagScan(T=uv.rows, C=uv.cols, N=modes, ldu=uv.ld, skip=bool(d), shared=shared)
        args = [Arg(uv, "r"), Arg(low.weight(a, "plain") if shared else low.columns(a), "r"), Arg(low.columns(c), "r")]
        args += [Arg(low.weight(d, "plain"), "r")] if d else []
        args += [Arg(low.state(past, present), "rw"), Arg(low.result(y), "w")]
        low.call(KernelRef("diag_scan", params), *args)

    return Claim((node,), (u, past), emit)


RULE = Rule(("ai.edgeseq.DiagScan",), _match)
