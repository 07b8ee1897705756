"""ai.edgeseq.SelectiveScan, with the projection of dt when it feeds nothing else -> kernels/selective_scan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from ..ir import Arg, KernelRef
from ..kernels.selective_scan import SelectiveScan
from . import Claim, Rule
from .linear import linear_weight

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering

MAX_RANK = 256
"""Above this a product of its own is better than one inside the scan."""


def _projection(low: Lowering, dt: str) -> tuple[Node, str, str] | None:
    """The MatMul that makes dt, its input and its float32 weight."""
    node = low.graph.producer.get(dt)
    if node is None or node.op != "MatMul" or low.graph.sole_consumer(dt) is None:
        return None
    found = linear_weight(low, node.inputs[1], False)
    if found is None or found[1] != "rows16" or low.graph.dtype(found[0]) != "float32":
        return None
    return (node, node.inputs[0], found[0]) if low.graph.shape(node.inputs[0])[-1] <= MAX_RANK else None


def _match(low: Lowering, node: Node) -> Claim | None:
    u, dt, a, b, c, skip, z, dt_bias, past = node.inputs
    y, present = node.outputs
    if not low.owns_state(past, present, (node,)):
        raise CompileError(f"{node.proto.name}: its state is read elsewhere", "a scan updates its state in place")
    projection = _projection(low, dt)
    rank_input = projection[1] if projection else dt

    def emit() -> None:
        uv, dtv, bv, cv = (low.rows(n) for n in (u, rank_input, b, c))
        zv = low.rows(z) if z else None
        params = SelectiveScan(
            T=uv.rows, D=uv.cols, N=bv.cols, ldu=uv.ld, lddt=dtv.ld, ldB=bv.ld, ldC=cv.ld, ldz=zv.ld if zv else 0,
            R=dtv.cols if projection else 0, skip=bool(skip), gate=bool(z), dt_bias=bool(dt_bias),
            dt_softplus=bool(node.attrs.get("dt_softplus", 1)), dt_min=float(node.attrs.get("dt_min", 0.0)),
            dt_max=float(node.attrs.get("dt_max", math.inf)),
        )  # fmt: skip
        args = [Arg(uv, "r"), Arg(dtv, "r"), Arg(low.weight(a, "plain"), "r"), Arg(bv, "r"), Arg(cv, "r")]
        args += [Arg(low.weight(projection[2], "rows16"), "r")] if projection else []
        args += [Arg(low.weight(skip, "plain"), "r")] if skip else []
        args += [Arg(zv, "r")] if zv else []
        args += [Arg(low.weight(dt_bias, "plain"), "r")] if dt_bias else []
        args += [Arg(low.state(past, present), "rw"), Arg(low.result(y), "w")]
        low.call(KernelRef("selective_scan", params), *args)

    nodes = (projection[0], node) if projection else (node,)
    return Claim(nodes, tuple(n for n in (u, rank_input, b, c, z, past) if n), emit)


RULE = Rule(("ai.edgeseq.SelectiveScan",), _match, absorbs=True)
