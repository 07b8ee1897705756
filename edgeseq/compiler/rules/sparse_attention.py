"""ai.edgeseq.SparseAttention -> kernels/cached_attention, ring with prefix and reservoir, caches in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeseq.errors import CompileError

from . import Claim, Rule
from .cached_attention import attend

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    q, k, v, past_k, past_v, position = node.inputs
    o, present_k, present_v = node.outputs
    if not (low.owns_state(past_k, present_k, (node,)) and low.owns_state(past_v, present_v, (node,))):
        raise CompileError(f"{node.proto.name}: its state is read elsewhere", "a cache is updated in place")

    def emit() -> None:
        drawn = {name: int(node.attrs.get(name, default)) for name, default in DEFAULTS.items()}
        heads, scale = int(node.attrs.get("num_heads", 1)), float(node.attrs.get("scale", 1.0))
        names = (q, k, v, past_k, present_k, past_v, present_v, position, o)
        attend(low, names, heads, scale, ring=True, **drawn)

    return Claim((node,), (q, k, v, position, past_k, past_v), emit)


DEFAULTS = {"prefix": 0, "block": 1, "blocks": 0, "seed": 0}
RULE = Rule(("ai.edgeseq.SparseAttention",), _match)
