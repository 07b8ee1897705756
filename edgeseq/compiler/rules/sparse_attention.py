"""ai.edgeseq.SparseAttention -> kernels/cached_attention, ring with prefix and reservoir, caches in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from ..ir import Arg, KernelRef
from ..kernels.cached_attention import CachedAttention
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    q, k, v, past_k, past_v, position = node.inputs
    o, present_k, present_v = node.outputs
    if not (low.owns_state(past_k, present_k, (node,)) and low.owns_state(past_v, present_v, (node,))):
        raise CompileError(f"{node.proto.name}: its state is read elsewhere", "a cache is updated in place")

    def emit() -> None:
        qv, kv, vv = low.rows(q), low.rows(k), low.rows(v)
        _, kv_heads, rows, d = low.graph.shape(past_k)
        tokens = low.graph.shape(q)[1]
        drawn = {name: int(node.attrs.get(name, default)) for name, default in DEFAULTS.items()}
        heads, scale = int(node.attrs.get("num_heads", 1)), float(node.attrs.get("scale", 1.0))
        params = CachedAttention(tokens, heads, kv_heads, d, rows, qv.ld, kv.ld, vv.ld, scale, ring=True, **drawn)
        args = [Arg(low.rows(n), "r") for n in (q, k, v)]
        args += [Arg(low.state(past_k, present_k), "rw"), Arg(low.state(past_v, present_v), "rw")]
        args += [Arg(low.rows(position), "r"), Arg(low.result(o), "w")]
        row = 2 * kv_heads * d * 4
        low.call(KernelRef("cached_attention", params), *args, state=min(tokens, rows) * row, kv=row, kv_rows=rows)

    return Claim((node,), (q, k, v, position, past_k, past_v), emit)


DEFAULTS = {"prefix": 0, "block": 1, "blocks": 0, "seed": 0}
RULE = Rule(("ai.edgeseq.SparseAttention",), _match)
