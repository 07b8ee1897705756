"""WKV4: the per-channel weighted average of RWKV-4 (Peng et al. 2023, arXiv 2305.13048, section 3.1.2, appendix D).

B batch, T tokens, C channels. A state is three rows: a, b and the exponent p that keeps both within range; what they
stand for is a e^p and b e^p.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, unify

DOC = """RWKV-4's average of values weighted by exponentials of keys, T >= 1 tokens from an explicit state (a, b, p).

  o_t = (e^(p-m) a + e^(u+k-m) v) / (e^(p-m) b + e^(u+k-m))             m = max(p, u + k),  u = time_first
  a   = e^(p+w-n) a + e^(k-n) v;  b = e^(p+w-n) b + e^(k-n);  p = n     n = max(p + w, k),  w = -exp(time_decay)

A fresh state has p = -1e30, which makes whatever finite a and b hold weigh nothing.
"""

FRESH = -1e30  # of every element: e^(p-m) is 0 then, whatever the keys

INPUTS = (
    Param("k", "[B,T,C]", "keys"),
    Param("v", "[B,T,C]", "values"),
    Param("time_decay", "[C]", "logarithm of the decay rate: a token's weight falls by exp(-exp(time_decay)) a step"),
    Param("time_first", "[C]", "u, added to the key of the current token for its own output"),
    Param("past", "[B,3,C]", "a, b and p before the first token"),
)
OUTPUTS = (Param("o", "[B,T,C]", "averages"), Param("present", "[B,3,C]", "a, b and p after the last token"))


def wkv4(k: NDArray, v: NDArray, time_decay: NDArray, time_first: NDArray, past: NDArray) -> tuple[NDArray, NDArray]:
    """The definition, token by token, in the dtype of `k` (float64 decides)."""
    a, b, p = (past[:, row].astype(k.dtype) for row in range(3))  # [B,C] each
    w, o = -np.exp(time_decay.astype(k.dtype)), np.empty_like(v)
    for t in range(k.shape[1]):
        own = time_first + k[:, t]
        m = np.maximum(p, own)
        before, now = np.exp(p - m), np.exp(own - m)
        o[:, t] = (before * a + now * v[:, t]) / (before * b + now)
        n = np.maximum(p + w, k[:, t])
        before, now = np.exp(p + w - n), np.exp(k[:, t] - n)
        a, b, p = before * a + now * v[:, t], before * b + now, n
    return o, np.stack([a, b, p], 1)


def infer(shapes: dict[str, Shape | None], attributes: Attributes) -> list[Shape]:
    size: dict[str, int | str | None] = {}
    unify(shapes, INPUTS, size)
    if size["3"] not in (3, None) and isinstance(size["3"], int):
        raise ValueError(f"past has {size['3']} rows, wanted 3")
    return [(size["B"], size["T"], size["C"]), (size["B"], 3, size["C"])]


def variant(present: frozenset[str], attributes: Attributes) -> str:
    return ""


def body(present: frozenset[str], attributes: Attributes) -> list[NodeProto]:
    """Scan over T of the state's three rows [B,C]; w is computed once outside."""
    scan = helper.make_node(
        "Scan", ["a_past", "b_past", "p_past", "k", "v"], ["a_present", "b_present", "p_present", "o"],
        body=_token_graph(), num_scan_inputs=2, scan_input_axes=[1, 1], scan_output_axes=[1],
    )  # fmt: skip
    rows = [f"{row}_past" for row in "abp"]
    return [
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Exp", ["time_decay"], ["rate"]),
        helper.make_node("Neg", ["rate"], ["w"]),
        helper.make_node("Split", ["past"], [f"{row}_apart" for row in rows], axis=1, num_outputs=3),
        *(helper.make_node("Squeeze", [f"{row}_apart", "one"], [row]) for row in rows),
        scan,
        *(helper.make_node("Unsqueeze", [f"{r}_present", "one"], [f"{r}_row"]) for r in "abp"),
        helper.make_node("Concat", ["a_row", "b_row", "p_row"], ["present"], axis=1),
    ]


def _token_graph() -> object:
    """One token. a, b, p, k, v [B,C] -> a', b', p', o [B,C]; time_first and w are captured."""

    def value(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    def mix(old: str, new: str, tag: str) -> list[NodeProto]:
        """e^(old-m), e^(new-m) with m their maximum, and both sums weighted with them."""
        return [
            helper.make_node("Max", [old, new], [f"{tag}_max"]),
            helper.make_node("Sub", [old, f"{tag}_max"], [f"{tag}_old"]),
            helper.make_node("Sub", [new, f"{tag}_max"], [f"{tag}_new"]),
            helper.make_node("Exp", [f"{tag}_old"], [f"{tag}_before"]),
            helper.make_node("Exp", [f"{tag}_new"], [f"{tag}_now"]),
            helper.make_node("Mul", [f"{tag}_before", "a"], [f"{tag}_a_before"]),
            helper.make_node("Mul", [f"{tag}_now", "v_t"], [f"{tag}_a_now"]),
            helper.make_node("Add", [f"{tag}_a_before", f"{tag}_a_now"], [f"{tag}_a"]),
            helper.make_node("Mul", [f"{tag}_before", "b"], [f"{tag}_b_before"]),
            helper.make_node("Add", [f"{tag}_b_before", f"{tag}_now"], [f"{tag}_b"]),
        ]

    nodes = [
        helper.make_node("Add", ["time_first", "k_t"], ["own"]),
        *mix("p", "own", "out"),
        helper.make_node("Div", ["out_a", "out_b"], ["o_t"]),
        helper.make_node("Add", ["p", "w"], ["decayed"]),
        *mix("decayed", "k_t", "next"),
    ]
    inputs = [value(name) for name in ("a", "b", "p", "k_t", "v_t")]
    return helper.make_graph(nodes, "token", inputs, [value(n) for n in ("next_a", "next_b", "next_max", "o_t")])


OP = Op("WKV4", DOC, INPUTS, OUTPUTS, {}, infer, variant, body, wkv4)
