"""ai.edgeseq.Retention -> kernels/linear_attention with a constant decay, state in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from ..ir import Arg
from ..kernels.linear_attention import LinearAttention, token_tile
from . import Claim, Rule
from .linear_attention import form

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    q, k, v, log_decay, past = node.inputs
    o, present = node.outputs
    if not low.owns_state(past, present, (node,)):
        raise CompileError(f"{node.proto.name}: its state is read elsewhere", "a retention updates its state in place")

    def emit() -> None:
        qv, kv, vv = (low.rows(n) for n in (q, k, v))
        heads = int(node.attrs["num_heads"])
        params = LinearAttention(
            T=qv.rows, H=heads, K=qv.cols // heads, V=vv.cols // heads, Hq=heads, Hk=heads, ldq=qv.ld, ldk=kv.ld,
            ldv=vv.ld, decay="constant", scale=float(node.attrs.get("scale", 1.0)),
            tile=token_tile(low.target.gemm_tile),
        )  # fmt: skip
        low.call(
            form(low, params), Arg(qv, "r"), Arg(kv, "r"), Arg(vv, "r"),
            Arg(low.weight(log_decay, "plain"), "r"), Arg(low.state(past, present), "rw"), Arg(low.result(o), "w"),
        )  # fmt: skip

    return Claim((node,), (q, k, v, past), emit)


RULE = Rule(("ai.edgeseq.Retention",), _match)
