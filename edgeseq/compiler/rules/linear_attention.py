"""LinearAttention, standard or com.microsoft -> kernels/linear_attention or linear_attention_chunk, state in place.

Queries and keys that are repeated to the heads of the state (Reshape, Expand, Reshape) are read where they are; so is
a decay that a weight repeats for every token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.linear_attention import Decay, LinearAttention, token_tile
from ..kernels.linear_attention_chunk import LinearAttentionChunk, chunk_tile, chunkwise
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering

RULES = ("linear", "gated", "delta", "gated_delta")


def unrepeated(low: Lowering, name: str, heads: int) -> tuple[str, int]:
    """The tensor whose heads `name` repeats, and how many it has; `name` itself where nothing is repeated."""
    graph = low.graph
    merge = graph.producer.get(name)
    expand = graph.producer.get(merge.inputs[0]) if merge is not None and merge.op == "Reshape" else None
    split = graph.producer.get(expand.inputs[0]) if expand is not None and expand.op == "Expand" else None
    if expand is None or split is None or split.op not in ("Reshape", "Unsqueeze"):
        return name, heads
    source = split.inputs[0]
    batch, tokens, width = (graph.shape(source) + (0, 0, 0))[:3]
    shape = graph.shape(expand.outputs[0])
    each = graph.shape(name)[-1] // heads
    fewer = width // each
    if not fewer or (batch, tokens, fewer, heads // fewer, each) != shape:
        return name, heads
    return source, fewer


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    q, k, v, past, decay, beta = (*node.inputs, "", "", "")[:6]
    o, present = (*node.outputs, "")[:2]
    rule = node.attrs.get("update_rule", "gated_delta")
    if not past or not low.owns_state(past, present, (node,)) or rule not in RULES:
        return None
    if bool(decay) != ("gated" in rule) or bool(beta) != ("delta" in rule) or graph.shape(q)[0] != 1:
        return None
    heads, key_width, value_width = graph.shape(past)[1:]
    if beta and graph.shape(beta)[-1] != heads:
        return None
    (q, q_heads), (k, k_heads) = queries_of(low, q, int(node.attrs["q_num_heads"]), heads), unrepeated(low, k, heads)
    constant = _constant_decay(low, decay, heads)

    def emit() -> None:
        qv, kv, vv = (low.rows(n) for n in (q, k, v))
        gv = low.weight(constant, "plain") if constant else low.rows(decay) if decay else None
        bv = low.rows(beta) if beta else None
        kind: Decay = "constant" if constant else "none" if gv is None else "head" if gv.cols == heads else "key"
        params = LinearAttention(
            T=vv.rows, H=heads, K=key_width, V=value_width, Hq=q_heads, Hk=k_heads, ldq=qv.ld, ldk=kv.ld, ldv=vv.ld,
            decay=kind, erase="key" if bv else "none", ldg=0 if constant or gv is None else gv.ld,
            ldb=bv.ld if bv else 0, scale=float(node.attrs.get("scale", 0.0)) or key_width**-0.5,
            tile=token_tile(low.target.gemm_tile),
        )  # fmt: skip
        reads = [x for x in (qv, kv, vv, gv, bv) if x is not None]
        args = [*(Arg(x, "r") for x in reads), Arg(low.state(past, present), "rw"), Arg(low.result(o), "w")]
        low.call(form(low, params), *args)

    return Claim((node,), tuple(n for n in (q, k, v, past, "" if constant else decay, beta) if n), emit)


def form(low: Lowering, p: LinearAttention) -> KernelRef:
    """Matrix products for many tokens on a CPU, else token by token."""
    if low.target.gpu is not None or not chunkwise(p):
        return KernelRef("linear_attention", p)
    many = LinearAttentionChunk(**vars(p) | {"tile": chunk_tile(low.target.gemm_tile)})
    return KernelRef("linear_attention_chunk", many)


def queries_of(low: Lowering, q: str, q_heads: int, heads: int) -> tuple[str, int]:
    """As `unrepeated`, of queries that may have heads of their own."""
    return unrepeated(low, q, q_heads) if q_heads == heads else (q, q_heads)


def _constant_decay(low: Lowering, decay: str, heads: int) -> str:
    """The weight [H] that an Expand repeats for every token, or ""."""
    node = low.graph.producer.get(decay) if decay else None
    source = node.inputs[0] if node is not None and node.op == "Expand" else ""
    return source if source in low.graph.weights and low.graph.shape(source) == (heads,) else ""


RULE = Rule(("LinearAttention", "com.microsoft.LinearAttention"), _match)
