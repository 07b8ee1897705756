"""TensorScatter of K and V, then causal Attention over the cache with its length -> kernels/cached_attention, or
attention_chunk for more than one token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..gpu.cached_attention import parts_of as parts_on_gpu
from ..ir import Arg, KernelRef
from ..kernels.attention_chunk import AttentionChunk
from ..kernels.attention_merge import AttentionMerge
from ..kernels.cached_attention import CachedAttention, parts_of
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
        heads, scale = graph.shape(q4)[1], float(node.attrs.get("scale", graph.shape(q4)[3] ** -0.5))
        names = (q, k, v, past_k, present_k, past_v, present_v, position, merged[-1].outputs[0])
        attend(low, names, heads, scale)

    return Claim(claimed, (q, k, v, position, past_k, past_v), emit)


def attend(
    low: Lowering,
    names: tuple[str, ...],
    heads: int,
    scale: float,
    ring: bool = False,
    prefix: int = 0,
    block: int = 1,
    blocks: int = 0,
    seed: int = 0,
) -> None:
    """The calls of one attention. names: q, k, v, past and present keys, past and present values, position, result.

    prefix, block, blocks, seed: of a ring, see `CachedAttention`.
    A step goes row by row; where the heads of keys are few and the cache is long, it is cut into parts that threads
    share, and a second launch merges them. A chunk goes by blocks of queries.
    """
    q, k, v, past_k, present_k, past_v, present_v, position, result = names
    qv, kv, vv = low.rows(q), low.rows(k), low.rows(v)
    _, kv_heads, rows, d = low.graph.shape(past_k)
    tokens = math.prod(qv.shape[:-1])
    sizes = (tokens, heads, kv_heads, d, rows, qv.ld, kv.ld, vv.ld, scale, ring)
    read = [Arg(low.rows(n), "r") for n in (q, k, v)]
    read += [Arg(low.state(past_k, present_k), "rw"), Arg(low.state(past_v, present_v), "rw")]
    read += [Arg(low.rows(position), "r")]
    row = 2 * kv_heads * d * 4
    moved = 2 if blocks else 1  # what a token replaces may be kept elsewhere
    traffic = {"state": min(tokens, rows) * row * moved, "kv": row} | ({"kv_rows": rows} if ring else {})
    out = Arg(low.result(result), "w")
    if tokens > 1 and not blocks and low.target.gpu is None:
        params = AttentionChunk(*sizes, prefix=prefix, tile=low.target.gemm_tile)
        low.call(KernelRef("attention_chunk", params), *read, out, **traffic)
        return
    parts = 1
    if tokens == 1 and not blocks:
        parts = parts_on_gpu(heads, kv_heads, rows) if low.target.gpu else parts_of(kv_heads, rows)
    step = CachedAttention(*sizes, prefix=prefix, block=block, blocks=blocks, seed=seed, parts=parts)
    if parts == 1:
        low.call(KernelRef("cached_attention", step), *read, out, **traffic)
        return
    partial = low.scratch(f"{result}.parts", "float32", (heads, parts, d + 2))
    low.call(KernelRef("cached_attention", step), *read, Arg(partial, "w"), **traffic)
    low.call(KernelRef("attention_merge", AttentionMerge(heads, d, parts)), Arg(partial, "r"), out)


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
