"""ai.edgeseq.GatedScan -> kernels/gated_scan, state in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from ..ir import Arg, KernelRef
from ..kernels.gated_scan import GatedScan
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    x, log_a, past = node.inputs
    h, present = node.outputs
    if not low.owns_state(past, present, (node,)):
        raise CompileError(f"{node.proto.name}: its state is read elsewhere", "a scan updates its state in place")

    def emit() -> None:
        xv, lv = low.rows(x), low.rows(log_a)
        params = GatedScan(T=xv.rows, D=xv.cols, ldx=xv.ld, ldl=lv.ld)
        state = Arg(low.state(past, present), "rw")
        low.call(KernelRef("gated_scan", params), Arg(xv, "r"), Arg(lv, "r"), state, Arg(low.result(h), "w"))

    return Claim((node,), (x, log_a, past), emit)


RULE = Rule(("ai.edgeseq.GatedScan",), _match)
