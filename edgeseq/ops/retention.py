"""Retention: linear attention with one constant decay per head (RetNet, Sun et al. 2023, arXiv 2307.08621, eq. 6).

B batch, T tokens, H heads, K key width and V value width per head. The state is K-major.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, attribute_ref, unify

DOC = """Retention over T >= 1 tokens from an explicit state, heads packed in the last axis.

  S   = exp(log_decay) * S + k_t (x) v_t                       S[K,V], per head
  o_t = scale * q_t . S                                        after the update

It is the standard LinearAttention with update_rule "gated" and a decay that does not depend on the token.
"""

INPUTS = (
    Param("q", "[B,T,HK]", "queries, H*K wide"),
    Param("k", "[B,T,HK]", "keys, H*K wide"),
    Param("v", "[B,T,HV]", "values, H*V wide"),
    Param("log_decay", "[H]", "logarithm of the decay, negative"),
    Param("past", "[B,H,K,V]", "state before the first token"),
)
OUTPUTS = (Param("o", "[B,T,HV]", "output, H*V wide"), Param("present", "[B,H,K,V]", "state after the last token"))
ATTRIBUTES: dict[str, tuple[int | float, str]] = {
    "num_heads": (1, "H, the number of heads."),
    "scale": (1.0, "Factor of the output; not zero."),
}


def retention(
    q: NDArray, k: NDArray, v: NDArray, log_decay: NDArray, past: NDArray, num_heads: int = 1, scale: float = 1.0
) -> tuple[NDArray, NDArray]:
    """The definition, token by token, in the dtype of `q` (float64 decides)."""
    batch, tokens, _ = q.shape
    q, k, v = (x.reshape(batch, tokens, num_heads, -1) for x in (q, k, v))
    S = past.astype(q.dtype)
    decay = np.exp(log_decay.astype(q.dtype))[:, None, None]  # [H,1,1]
    o = np.empty_like(v)
    for t in range(tokens):
        S = decay * S + k[:, t, :, :, None] * v[:, t, :, None, :]  # [B,H,K,V]
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o.reshape(batch, tokens, -1), S


def infer(shapes: dict[str, Shape | None], attributes: Attributes) -> list[Shape]:
    heads = int(attributes["num_heads"])
    if heads < 1 or attributes["scale"] == 0:
        raise ValueError(f"num_heads {heads} must be positive and scale {attributes['scale']} not zero")
    size: dict[str, int | str | None] = {"H": heads}
    unify(shapes, INPUTS, size)
    for packed, part in (("HK", "K"), ("HV", "V")):
        width, each = size[packed], size[part]
        if isinstance(width, int) and width % heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {heads}")
        if isinstance(width, int) and isinstance(each, int) and width != heads * each:
            raise ValueError(f"width {width} differs from num_heads {heads} times {each}")
        if isinstance(width, int):
            size[part] = width // heads
        elif isinstance(each, int):
            size[packed] = each * heads
    return [(size["B"], size["T"], size["HV"]), (size["B"], heads, size["K"], size["V"])]


def variant(present: frozenset[str], attributes: Attributes) -> str:
    return ""


def body(present: frozenset[str], attributes: Attributes) -> list[NodeProto]:
    """The standard gated LinearAttention; log_decay is repeated for every batch row and token."""
    attend = helper.make_node(
        "LinearAttention", ["q", "k", "v", "past", "decay"], ["o", "present"], update_rule="gated"
    )
    attend.attribute.extend(
        (
            attribute_ref("q_num_heads", "num_heads", AttributeProto.INT),
            attribute_ref("kv_num_heads", "num_heads", AttributeProto.INT),
            attribute_ref("scale", "scale", AttributeProto.FLOAT),
        )
    )
    return [
        helper.make_node("Shape", ["q"], ["batch_tokens"], start=0, end=2),
        helper.make_node("Shape", ["log_decay"], ["heads"]),
        helper.make_node("Concat", ["batch_tokens", "heads"], ["decay_shape"], axis=0),  # [B,T,H]
        helper.make_node("Expand", ["log_decay", "decay_shape"], ["decay"]),
        attend,
    ]


OP = Op("Retention", DOC, INPUTS, OUTPUTS, ATTRIBUTES, infer, variant, body, retention)
