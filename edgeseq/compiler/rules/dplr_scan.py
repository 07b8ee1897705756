"""ai.edgeseq.DPLRScan -> kernels/linear_attention, which erases with a and b of their own; state in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from ..ir import Arg, KernelRef
from ..kernels.linear_attention import LinearAttention, token_tile
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    *reads, past = node.inputs
    o, present = node.outputs
    if not low.owns_state(past, present, (node,)):
        raise CompileError(f"{node.proto.name}: its state is read elsewhere", "a scan updates its state in place")

    def emit() -> None:
        q, k, v, g, a, b = (low.rows(n) for n in reads)
        heads, key_width, value_width = low.graph.shape(past)[1:]
        params = LinearAttention(
            T=v.rows, H=heads, K=key_width, V=value_width, Hq=heads, Hk=heads, ldq=q.ld, ldk=k.ld, ldv=v.ld,
            decay="key", erase="free", ldg=g.ld, lda=a.ld, ldb=b.ld, scale=float(node.attrs.get("scale", 1.0)),
            tile=token_tile(low.target.gemm_tile),
        )  # fmt: skip
        state = low.state(past, present)
        args = [Arg(x, "r") for x in (q, k, v, g, a, b)]
        low.call(KernelRef("linear_attention", params), *args, Arg(state, "rw"), Arg(low.result(o), "w"))

    return Claim((node,), tuple(node.inputs), emit)


RULE = Rule(("ai.edgeseq.DPLRScan",), _match)
