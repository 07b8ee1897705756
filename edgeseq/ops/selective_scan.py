"""SelectiveScan: Mamba's recurrence with a decay per channel and per state (Gu and Dao 2023, arXiv 2312.00752, eq. 2).

B batch, T tokens, D channels, N states per channel. The state is N-major so that vector lanes are channels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, attribute_ref, unify
from edgeseq.ops.standard import silu

DOC = """Selective state space recurrence over T >= 1 tokens from an explicit state.

  d_t  = clip(softplus(dt_t + dt_bias), dt_min, dt_max)        softplus only if dt_softplus, no clip at the defaults
  S    = exp(d_t * A) * S + B_t (x) (d_t * u_t)                S[N,D]
  y_t  = (C_t . S + D * u_t) * z_t * sigmoid(z_t)              the D and z terms only if given
"""

INPUTS = (
    Param("u", "[B,T,D]", "input of the recurrence"),
    Param("dt", "[B,T,D]", "step size before bias and softplus"),
    Param("A", "[N,D]", "decay rate, negative: -exp(A_log), transposed"),
    Param("B", "[B,T,N]", "input projection"),
    Param("C", "[B,T,N]", "output projection"),
    Param("D", "[D]", "skip connection", optional=True),
    Param("z", "[B,T,D]", "gate before SiLU", optional=True),
    Param("dt_bias", "[D]", "added to dt before softplus", optional=True),
    Param("past", "[B,N,D]", "state before the first token"),
)
OUTPUTS = (Param("y", "[B,T,D]", "output"), Param("present", "[B,N,D]", "state after the last token"))
ATTRIBUTES: dict[str, tuple[int | float, str]] = {
    "dt_softplus": (1, "1: softplus of dt (torch's, linear above 20); 0: dt as it is."),
    "dt_min": (0.0, "Lower bound of the step size."),
    "dt_max": (math.inf, "Upper bound of the step size."),
}


def selective_scan(
    u: NDArray, dt: NDArray, A: NDArray, B: NDArray, C: NDArray,
    D: NDArray | None = None, z: NDArray | None = None, dt_bias: NDArray | None = None,
    past: NDArray | None = None, dt_softplus: int = 1, dt_min: float = 0.0, dt_max: float = math.inf,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """The definition, token by token, in the dtype of `u` (float64 decides). No past means zeros."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = np.where(dt > 20, dt, np.log1p(np.exp(np.minimum(dt, 20))))
    if dt_min > 0 or dt_max < math.inf:
        dt = np.clip(dt, dt_min, dt_max)
    dt = dt.astype(u.dtype)  # [B,T,D]
    batch, tokens, channels = u.shape
    S = np.zeros((batch, A.shape[0], channels), u.dtype) if past is None else past.astype(u.dtype)
    y = np.empty_like(u)
    for t in range(tokens):
        S = np.exp(dt[:, t, None] * A) * S + B[:, t, :, None] * (dt[:, t] * u[:, t])[:, None]  # [B,N,D]
        y[:, t] = np.einsum("bn,bnd->bd", C[:, t], S)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * silu(z)
    return y, S


def infer(shapes: dict[str, Shape | None], attributes: Attributes) -> list[Shape]:
    if attributes["dt_min"] > attributes["dt_max"]:
        raise ValueError(f"dt_min {attributes['dt_min']} exceeds dt_max {attributes['dt_max']}")
    size: dict[str, int | str | None] = {}
    unify(shapes, INPUTS, size)
    return [(size["B"], size["T"], size["D"]), (size["B"], size["N"], size["D"])]


def variant(present: frozenset[str], attributes: Attributes) -> str:
    parts = [f"no_{name}" for name in ("D", "z", "dt_bias") if name not in present]
    parts += [] if attributes["dt_softplus"] else ["raw"]
    parts += ["clip"] if _clips(attributes) else []
    return "_".join(parts)


def _clips(attributes: Attributes) -> bool:
    return attributes["dt_min"] > 0 or attributes["dt_max"] < math.inf


def body(present: frozenset[str], attributes: Attributes) -> list[NodeProto]:
    """Scan over T with exp(dt*A) inside, so that [T,N,D] never exists; bias, skip and gate are vectorised outside."""
    nodes: list[NodeProto] = []

    def emit(op: str, inputs: list[str], output: str, **attrs: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attrs))
        return output

    step = emit("Add", ["dt", "dt_bias"], "dt_biased") if "dt_bias" in present else "dt"
    if attributes["dt_softplus"]:
        step = emit("Softplus", [step], "dt_positive")
    if _clips(attributes):
        for name in ("dt_min", "dt_max"):
            node = helper.make_node("Constant", [], [name])
            node.attribute.append(attribute_ref("value_float", name, AttributeProto.FLOAT))
            nodes.append(node)
        step = emit("Clip", [step, "dt_min", "dt_max"], "dt_clipped")
    emit("Mul", [step, "u"], "du")
    scan = helper.make_node(
        "Scan", ["past", step, "du", "B", "C"], ["present", "states_read"],
        body=_token_graph(), num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1],
    )  # fmt: skip
    nodes.append(scan)
    y = "states_read"
    if "D" in present:
        y = emit("Add", [y, emit("Mul", ["D", "u"], "skip")], "with_skip")
    if "z" in present:
        y = emit("Mul", [y, emit("Mul", ["z", emit("Sigmoid", ["z"], "sigmoid_z")], "gate")], "gated")
    nodes[-1].output[:] = ["present", "y"] if nodes[-1] is scan else ["y"]
    return nodes


def _token_graph() -> object:
    """One token. S[B,N,D], d[B,D], du[B,D], b[B,N], c[B,N] -> S'[B,N,D], y[B,D]; A is captured."""

    def value(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    def axis(name: str, at: int) -> NodeProto:
        return helper.make_node("Constant", [], [name], value_ints=[at])

    nodes = [
        axis("one", 1),
        axis("two", 2),
        helper.make_node("Unsqueeze", ["d", "one"], ["d_row"]),  # [B,1,D]
        helper.make_node("Mul", ["d_row", "A"], ["d_A"]),  # [B,N,D]
        helper.make_node("Exp", ["d_A"], ["decay"]),
        helper.make_node("Mul", ["decay", "S"], ["S_decayed"]),
        helper.make_node("Unsqueeze", ["b", "two"], ["b_column"]),  # [B,N,1]
        helper.make_node("Unsqueeze", ["du_t", "one"], ["du_row"]),  # [B,1,D]
        helper.make_node("Mul", ["b_column", "du_row"], ["S_input"]),  # [B,N,D]
        helper.make_node("Add", ["S_decayed", "S_input"], ["S_next"]),
        helper.make_node("Unsqueeze", ["c", "one"], ["c_row"]),  # [B,1,N]
        helper.make_node("MatMul", ["c_row", "S_next"], ["y_row"]),  # [B,1,D]
        helper.make_node("Squeeze", ["y_row", "one"], ["y_t"]),
    ]
    inputs = [value(name) for name in ("S", "d", "du_t", "b", "c")]
    return helper.make_graph(nodes, "token", inputs, [value("S_next"), value("y_t")])


OP = Op("SelectiveScan", DOC, INPUTS, OUTPUTS, ATTRIBUTES, infer, variant, body, selective_scan)
