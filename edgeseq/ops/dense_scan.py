"""DenseScan: a state space model with a dense real step matrix per channel (S4's recurrence, Gu et al. 2022,
arXiv 2111.00396, section 2.3, discretised).

B batch, T tokens, C channels, N real states per channel. Channels come last everywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, unify

DOC = """One linear recurrence with an N x N matrix per channel over T >= 1 tokens from an explicit state.

  x   = a x + b u_t                                            a[N,N], b[N], c[N] per channel
  y_t = c . x + d u_t                                          after the update

It is for matrices that must not be diagonalised in float32: the eigenvectors of S4's step matrix have a condition
number of 1e7 at 16 states, and a diagonal step is then wrong by a third.
"""

INPUTS = (
    Param("u", "[B,T,C]", "input"),
    Param("a", "[N,N,C]", "step matrix, row before column"),
    Param("b", "[N,C]", "input column"),
    Param("c", "[N,C]", "output row"),
    Param("d", "[C]", "skip connection", optional=True),
    Param("past", "[B,N,C]", "state before the first token"),
)
OUTPUTS = (Param("y", "[B,T,C]", "output"), Param("present", "[B,N,C]", "state after the last token"))


def dense_scan(
    u: NDArray, a: NDArray, b: NDArray, c: NDArray, d: NDArray | None = None, past: NDArray | None = None
) -> tuple[NDArray, NDArray]:
    """The definition, token by token, in the dtype of `u` (float64 decides). No past means zeros."""
    batch, tokens, _ = u.shape
    x = np.zeros((batch, *b.shape), u.dtype) if past is None else past.astype(u.dtype)  # [B,N,C]
    y = np.empty_like(u)
    for t in range(tokens):
        x = np.einsum("ijc,zjc->zic", a, x) + b * u[:, t, None]
        y[:, t] = (c * x).sum(1)
    if d is not None:
        y = y + d * u
    return y, x


def infer(shapes: dict[str, Shape | None], attributes: Attributes) -> list[Shape]:
    size: dict[str, int | str | None] = {}
    unify(shapes, INPUTS, size)
    return [(size["B"], size["T"], size["C"]), (size["B"], size["N"], size["C"])]


def variant(present: frozenset[str], attributes: Attributes) -> str:
    return "" if "d" in present else "no_d"


def body(present: frozenset[str], attributes: Attributes) -> list[NodeProto]:
    """Scan over T of x [B,N,C]; the skip is vectorised outside."""
    scan = helper.make_node(
        "Scan", ["past", "u"], ["present", "read"],
        body=_token_graph(), num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1],
    )  # fmt: skip
    if "d" not in present:
        scan.output[1] = "y"
        return [scan]
    return [
        scan,
        helper.make_node("Mul", ["d", "u"], ["skip"]),
        helper.make_node("Add", ["read", "skip"], ["y"]),
    ]


def _token_graph() -> object:
    """One token. x [B,N,C], u [B,C] -> x', y [B,C]; a, b and c are captured."""

    def value(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    nodes = [
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Constant", [], ["two"], value_ints=[2]),
        helper.make_node("Unsqueeze", ["x", "one"], ["x_row"]),  # [B,1,N,C]
        helper.make_node("Mul", ["a", "x_row"], ["products"]),  # [B,N,N,C]
        helper.make_node("ReduceSum", ["products", "two"], ["moved"], keepdims=0),
        helper.make_node("Unsqueeze", ["u_t", "one"], ["u_row"]),
        helper.make_node("Mul", ["b", "u_row"], ["fed"]),  # [B,N,C]
        helper.make_node("Add", ["moved", "fed"], ["x_next"]),
        helper.make_node("Mul", ["c", "x_next"], ["read_states"]),
        helper.make_node("ReduceSum", ["read_states", "one"], ["y_t"], keepdims=0),
    ]
    return helper.make_graph(nodes, "token", [value("x"), value("u_t")], [value("x_next"), value("y_t")])


OP = Op("DenseScan", DOC, INPUTS, OUTPUTS, {}, infer, variant, body, dense_scan)
