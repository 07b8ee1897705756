"""TensorScatter of K and V, then causal Attention over the cache with its length -> kernels/cached_attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.cached_attention import CachedAttention
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering

HEADS_FIRST = [0, 2, 1, 3]


def _flat_heads(low: Lowering, name: str) -> str | None:
    """x[B,T,H*d] behind Transpose(Reshape(x)) = [B,H,T,d]; with T = 1 the transpose may be missing."""
    node = low.graph.producer.get(name)
    if node is not None and node.op == "Transpose" and node.attrs.get("perm") == HEADS_FIRST:
        node = low.graph.producer.get(node.inputs[0])
    return node.inputs[0] if node is not None and node.op == "Reshape" else None


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    q4, present_k, present_v, *rest = node.inputs
    length = rest[3] if len(rest) > 3 else ""
    scatter_k, scatter_v = graph.producer.get(present_k), graph.producer.get(present_v)
    if not length or any(rest[:3]) or not node.attrs.get("is_causal") or node.attrs.get("softcap"):
        return None
    if scatter_k is None or scatter_v is None or {scatter_k.op, scatter_v.op} != {"TensorScatter"}:
        return None
    if any(
        s.attrs.get("mode", "linear") != "linear" or s.attrs.get("axis", -2) not in (2, -2)
        for s in (scatter_k, scatter_v)
    ):
        return None
    past_k, k4, position = scatter_k.inputs
    past_v, v4 = scatter_v.inputs[:2]
    if not _is_end(low, length, position, graph.shape(q4)[2]):
        return None
    q, k, v = (_flat_heads(low, n) for n in (q4, k4, v4))
    merged = _merged(low, node.outputs[0])
    if q is None or k is None or v is None or merged is None:
        return None
    claimed = (scatter_k, scatter_v, node, *merged)
    if not (low.owns_state(past_k, present_k, claimed) and low.owns_state(past_v, present_v, claimed)):
        return None

    def emit() -> None:
        qv, kv, vv = low.rows(q), low.rows(k), low.rows(v)
        _, heads, tokens, d = graph.shape(q4)
        _, kv_heads, rows, _ = graph.shape(past_k)
        scale = float(node.attrs.get("scale", d**-0.5))
        params = CachedAttention(tokens, heads, kv_heads, d, rows, qv.ld, kv.ld, vv.ld, scale)
        args = [Arg(low.rows(n), "r") for n in (q, k, v)]
        args += [Arg(low.state(past_k, present_k), "rw"), Arg(low.state(past_v, present_v), "rw")]
        args += [Arg(low.rows(position), "r"), Arg(low.result(merged[-1].outputs[0]), "w")]
        row = 2 * kv_heads * d * 4
        low.call(KernelRef("cached_attention", params), *args, state=tokens * row, kv=row)

    return Claim(claimed, (q, k, v, position, past_k, past_v), emit)


def _is_end(low: Lowering, length: str, position: str, tokens: int) -> bool:
    """length = position + tokens, so that the causal mask of query t ends at row position + t."""
    node = low.graph.producer.get(length)
    if node is None or node.op != "Add" or position not in node.inputs:
        return False
    other = low.graph.constant(next((n for n in node.inputs if n != position), position))
    return other is not None and other.size == 1 and int(other.reshape(-1)[0]) == tokens


def _merged(low: Lowering, name: str) -> tuple[Node, ...] | None:
    """The nodes that bring o[B,H,T,d] back to [B,T,H*d]."""
    nodes = []
    node = low.graph.sole_consumer(name)
    if node is not None and node.op == "Transpose" and node.attrs.get("perm") == HEADS_FIRST:
        nodes.append(node)
        node = low.graph.sole_consumer(node.outputs[0])
    if node is None or node.op != "Reshape":
        return None
    return (*nodes, node)


RULE = Rule(("Attention",), _match)
