"""ai.edgeseq.WKV4 -> kernels/wkv4, state in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from ..ir import Arg, KernelRef
from ..kernels.wkv4 import Wkv4
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    k, v, time_decay, time_first, past = node.inputs
    o, present = node.outputs
    if not low.owns_state(past, present, (node,)):
        raise CompileError(f"{node.proto.name}: its state is read elsewhere", "an average updates its state in place")

    def emit() -> None:
        kv, vv = low.rows(k), low.rows(v)
        params = Wkv4(T=kv.rows, C=kv.cols, ldk=kv.ld, ldv=vv.ld)
        weights = [Arg(low.weight(n, "plain"), "r") for n in (time_decay, time_first)]
        state = Arg(low.state(past, present), "rw")
        low.call(KernelRef("wkv4", params), Arg(kv, "r"), Arg(vv, "r"), *weights, state, Arg(low.result(o), "w"))

    return Claim((node,), (k, v, past), emit)


RULE = Rule(("ai.edgeseq.WKV4",), _match)
