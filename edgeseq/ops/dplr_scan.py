"""DPLRScan: matrix-state recurrence with a diagonal-plus-low-rank transition (RWKV-7, Peng et al. 2025, eq. 17).

B batch, T tokens, H heads, K key width and V value width per head. The state is K-major.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, attribute_ref, unify

DOC = """Diagonal-plus-low-rank scan over T >= 1 tokens from an explicit state, heads packed in the last axis.

  S   = diag(exp(g_t)) S + b_t (a_t . S) + k_t (x) v_t         S[K,V], per head; both terms read the old S
  o_t = scale * q_t . S                                        after the update

b = 0 gives gated linear attention, a = exp(g) k and b = -beta k with beta v in the place of v the gated delta rule.
"""

INPUTS = (
    Param("q", "[B,T,HK]", "queries, H*K wide"),
    Param("k", "[B,T,HK]", "keys, H*K wide"),
    Param("v", "[B,T,HV]", "values, H*V wide"),
    Param("g", "[B,T,HK]", "logarithm of the decay of each key channel, not positive"),
    Param("a", "[B,T,HK]", "what is read from the old state"),
    Param("b", "[B,T,HK]", "where it is added"),
    Param("past", "[B,H,K,V]", "state before the first token"),
)
OUTPUTS = (Param("o", "[B,T,HV]", "output, H*V wide"), Param("present", "[B,H,K,V]", "state after the last token"))
ATTRIBUTES: dict[str, tuple[int | float, str]] = {
    "num_heads": (1, "H, the number of heads."),
    "scale": (1.0, "Factor of the output; not zero."),
}


def dplr_scan(
    q: NDArray, k: NDArray, v: NDArray, g: NDArray, a: NDArray, b: NDArray, past: NDArray,
    num_heads: int = 1, scale: float = 1.0,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """The definition, token by token, in the dtype of `q` (float64 decides)."""
    batch, tokens, _ = q.shape
    q, k, v, g, a, b = (x.reshape(batch, tokens, num_heads, -1) for x in (q, k, v, g, a, b))
    S = past.astype(q.dtype)
    o = np.empty_like(v)
    for t in range(tokens):
        read = np.einsum("bhk,bhkv->bhv", a[:, t], S)
        added = b[:, t, :, :, None] * read[:, :, None] + k[:, t, :, :, None] * v[:, t, :, None]  # [B,H,K,V]
        S = np.exp(g[:, t])[..., None] * S + added
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
    """Scan over T of the heads taken apart; one outer product for each of the two rank-one terms."""
    heads = helper.make_node("Constant", [], ["heads"])
    heads.attribute.append(attribute_ref("value_int", "num_heads", AttributeProto.INT))
    scale = helper.make_node("Constant", [], ["scale_value"])
    scale.attribute.append(attribute_ref("value_float", "scale", AttributeProto.FLOAT))
    apart = [helper.make_node("Reshape", [x, "apart_shape"], [f"{x}_heads"]) for x in "qkvgab"]  # [B,T,H,.]
    scan = helper.make_node(
        "Scan", ["past", *(f"{x}_heads" for x in "qkvgab")], ["present", "o_heads"],
        body=_token_graph(), num_scan_inputs=6, scan_input_axes=[1] * 6, scan_output_axes=[1],
    )  # fmt: skip
    return [
        heads,
        scale,
        helper.make_node("Constant", [], ["zero"], value_ints=[0]),
        helper.make_node("Constant", [], ["copy_two"], value_ints=[0, 0]),
        helper.make_node("Constant", [], ["rest"], value_ints=[-1]),
        helper.make_node("Unsqueeze", ["heads", "zero"], ["heads_axis"]),
        helper.make_node("Concat", ["copy_two", "heads_axis", "rest"], ["apart_shape"], axis=0),
        helper.make_node("Concat", ["copy_two", "rest"], ["packed_shape"], axis=0),
        *apart,
        scan,
        helper.make_node("Reshape", ["o_heads", "packed_shape"], ["o_unscaled"]),
        helper.make_node("Mul", ["o_unscaled", "scale_value"], ["o"]),
    ]


def _token_graph() -> object:
    """One token. S[B,H,K,V]; q, k, g, a, b [B,H,K]; v [B,H,V] -> S'[B,H,K,V], o[B,H,V]."""

    def value(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    def axis(name: str, at: int) -> NodeProto:
        return helper.make_node("Constant", [], [name], value_ints=[at])

    def column(name: str) -> NodeProto:
        return helper.make_node("Unsqueeze", [f"{name}_t", "three"], [f"{name}_column"])  # [B,H,K,1]

    def row(name: str) -> NodeProto:
        return helper.make_node("Unsqueeze", [f"{name}_t", "two"], [f"{name}_row"])  # [B,H,1,.]

    nodes = [
        axis("two", 2),
        axis("three", 3),
        *map(column, "gbk"),
        *map(row, "avq"),
        helper.make_node("Exp", ["g_column"], ["decay"]),
        helper.make_node("Mul", ["decay", "S"], ["S_decayed"]),
        helper.make_node("MatMul", ["a_row", "S"], ["read"]),  # [B,H,1,V]
        helper.make_node("Mul", ["b_column", "read"], ["S_low_rank"]),
        helper.make_node("Mul", ["k_column", "v_row"], ["S_input"]),
        helper.make_node("Add", ["S_decayed", "S_low_rank"], ["S_kept"]),
        helper.make_node("Add", ["S_kept", "S_input"], ["S_next"]),
        helper.make_node("MatMul", ["q_row", "S_next"], ["o_row"]),
        helper.make_node("Squeeze", ["o_row", "two"], ["o_t"]),
    ]
    inputs = [value("S"), *(value(f"{name}_t") for name in "qkvgab")]
    return helper.make_graph(nodes, "token", inputs, [value("S_next"), value("o_t")])


OP = Op("DPLRScan", DOC, INPUTS, OUTPUTS, ATTRIBUTES, infer, variant, body, dplr_scan)
