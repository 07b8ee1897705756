"""GatedScan: a diagonal linear recurrence whose decay depends on the token (RG-LRU of Griffin, De et al. 2024, arXiv
2402.19427, section 2.4; HGRN; any first-order gate).

B batch, T tokens, D channels. What a model multiplies its input with (sqrt(1 - a^2) in Griffin) is done before.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, unify

DOC = """A linear recurrence of each channel by itself over T >= 1 tokens from an explicit state.

  h_t = exp(log_a_t) h_{t-1} + x_t

log_a <= 0 keeps the state bounded; -inf forgets it.
"""

INPUTS = (
    Param("x", "[B,T,D]", "input"),
    Param("log_a", "[B,T,D]", "logarithm of the decay"),
    Param("past", "[B,D]", "state before the first token"),
)
OUTPUTS = (Param("h", "[B,T,D]", "states"), Param("present", "[B,D]", "state after the last token"))


def gated_scan(x: NDArray, log_a: NDArray, past: NDArray) -> tuple[NDArray, NDArray]:
    """The definition, token by token, in the dtype of `x` (float64 decides)."""
    state, h = past.astype(x.dtype), np.empty_like(x)
    for t in range(x.shape[1]):
        state = np.exp(log_a[:, t].astype(x.dtype)) * state + x[:, t]
        h[:, t] = state
    return h, state


def infer(shapes: dict[str, Shape | None], attributes: Attributes) -> list[Shape]:
    size: dict[str, int | str | None] = {}
    unify(shapes, INPUTS, size)
    return [(size["B"], size["T"], size["D"]), (size["B"], size["D"])]


def variant(present: frozenset[str], attributes: Attributes) -> str:
    return ""


def body(present: frozenset[str], attributes: Attributes) -> list[NodeProto]:
    """Scan over T of the state [B,D]; the exponential is taken of all tokens at once."""

    def value(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    token = helper.make_graph(
        [
            helper.make_node("Mul", ["a_t", "state"], ["kept"]),
            helper.make_node("Add", ["kept", "x_t"], ["next"]),
            helper.make_node("Identity", ["next"], ["h_t"]),
        ],
        "token",
        [value(n) for n in ("state", "a_t", "x_t")],
        [value(n) for n in ("next", "h_t")],
    )
    return [
        helper.make_node("Exp", ["log_a"], ["a"]),
        helper.make_node(
            "Scan", ["past", "a", "x"], ["present", "h"],
            body=token, num_scan_inputs=2, scan_input_axes=[1, 1], scan_output_axes=[1],
        ),
    ]  # fmt: skip


OP = Op("GatedScan", DOC, INPUTS, OUTPUTS, {}, infer, variant, body, gated_scan)
