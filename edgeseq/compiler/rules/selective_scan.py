"""ai.edgeseq.SelectiveScan -> kernels/selective_scan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from ..ir import Arg, KernelRef
from ..kernels.selective_scan import SelectiveScan
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    u, dt, a, b, c, skip, z, dt_bias, past = node.inputs
    y, present = node.outputs
    if not low.owns_state(past, present, (node,)):
        raise CompileError(f"{node.proto.name}: its state is read elsewhere", "a scan updates its state in place")

    def emit() -> None:
        uv, dtv, bv, cv = (low.rows(n) for n in (u, dt, b, c))
        zv = low.rows(z) if z else None
        params = SelectiveScan(
            T=uv.rows, D=uv.cols, N=bv.cols, ldu=uv.ld, lddt=dtv.ld, ldB=bv.ld, ldC=cv.ld, ldz=zv.ld if zv else 0,
            skip=bool(skip), gate=bool(z), dt_bias=bool(dt_bias),
            dt_softplus=bool(node.attrs.get("dt_softplus", 1)), dt_min=float(node.attrs.get("dt_min", 0.0)),
            dt_max=float(node.attrs.get("dt_max", math.inf)),
        )  # fmt: skip
        args = [Arg(uv, "r"), Arg(dtv, "r"), Arg(low.weight(a, "plain"), "r"), Arg(bv, "r"), Arg(cv, "r")]
        args += [Arg(low.weight(skip, "plain"), "r")] if skip else []
        args += [Arg(zv, "r")] if zv else []
        args += [Arg(low.weight(dt_bias, "plain"), "r")] if dt_bias else []
        args += [Arg(low.state(past, present), "rw"), Arg(low.result(y), "w")]
        low.call(KernelRef("selective_scan", params), *args)

    return Claim((node,), tuple(n for n in (u, dt, b, c, z, past) if n), emit)


RULE = Rule(("ai.edgeseq.SelectiveScan",), _match)
