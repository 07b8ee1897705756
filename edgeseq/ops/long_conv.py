"""LongConvStep: a depthwise causal convolution with a long filter, its whole past kept (Hyena, Poli et al. 2023,
arXiv 2302.10866, section 3; undistilled).

B batch, T tokens, C channels, L taps, M rows of the history.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, unify

DOC = """Depthwise causal convolution of T >= 1 tokens that continue `position` earlier ones.

  y_t = d x_t + sum_(j < L) h_j x_(t-j)                        per channel; x is 0 before the first token

The past is exact and grows: token p lies in row p of the history, rows from position + T on are neither read nor
changed. A token costs min(position + 1, L) multiply-adds per channel, which reads as many rows of history and filter.
"""

INPUTS = (
    Param("x", "[B,T,C]", "input"),
    Param("h", "[L,C]", "filter; row j multiplies the input j tokens ago"),
    Param("d", "[C]", "skip connection", optional=True),
    Param("past", "[B,M,C]", "inputs so far, oldest first"),
    Param("position", "[B]", "tokens in the history; position + T must not exceed M", type="int64"),
)
OUTPUTS = (Param("y", "[B,T,C]", "output"), Param("present", "[B,M,C]", "history with the new rows"))


def long_conv(
    x: NDArray, h: NDArray, d: NDArray | None = None, past: NDArray | None = None, position: NDArray | None = None
) -> tuple[NDArray, NDArray]:
    """The definition, token by token, in the dtype of `x` (float64 decides). No past means a history of T rows."""
    batch, tokens, _ = x.shape
    start = np.zeros(batch, np.int64) if position is None else position
    present = np.zeros_like(x) if past is None else past.astype(x.dtype)
    y = np.empty_like(x)
    for b in range(batch):
        for t in range(tokens):
            row = int(start[b]) + t
            present[b, row] = x[b, t]
            taps = min(row + 1, len(h))
            y[b, t] = (h[:taps] * present[b, row + 1 - taps : row + 1][::-1]).sum(0)
    if d is not None:
        y = y + d * x
    return y, present


def infer(shapes: dict[str, Shape | None], attributes: Attributes) -> list[Shape]:
    size: dict[str, int | str | None] = {}
    unify(shapes, INPUTS, size)
    tokens, rows = size["T"], size["M"]
    if isinstance(tokens, int) and isinstance(rows, int) and tokens > rows:
        raise ValueError(f"{tokens} tokens do not fit into a history of {rows}")
    return [(size["B"], size["T"], size["C"]), (size["B"], size["M"], size["C"])]


def variant(present: frozenset[str], attributes: Attributes) -> str:
    return "" if "d" in present else "no_d"


def body(present: frozenset[str], attributes: Attributes) -> list[NodeProto]:
    """TensorScatter of the new rows, then a Scan over T that gathers the last rows of each token, newest first."""
    skip = [helper.make_node("Mul", ["d", "x"], ["skip"]), helper.make_node("Add", ["conv", "skip"], ["y"])]
    return [
        helper.make_node("TensorScatter", ["past", "x", "position"], ["present"], axis=1),
        *(helper.make_node("Constant", [], [name], value_ints=[value]) for name, value in _NUMBERS.items()),
        helper.make_node("Shape", ["h"], ["taps"], start=0, end=1),
        helper.make_node("Shape", ["past"], ["rows"], start=1, end=2),
        helper.make_node("Min", ["taps", "rows"], ["reach"]),
        helper.make_node("Slice", ["h", "zero", "reach", "zero"], ["near"]),  # [n,C]
        *_range("reach", "back"),
        helper.make_node("Shape", ["x"], ["tokens"], start=1, end=2),
        *_range("tokens", "steps"),
        helper.make_node("Unsqueeze", ["position", "one"], ["first"]),  # [B,1]
        helper.make_node("Sub", ["first", "back"], ["before_first"]),  # [B,n], row of each tap less the token
        helper.make_node("Constant", [], ["nothing"], value_float=0.0),
        helper.make_node(
            "Scan", ["steps"], ["conv" if "d" in present else "y"],
            body=_token_graph(), num_scan_inputs=1, scan_input_axes=[0], scan_output_axes=[1],
        ),
        *(skip if "d" in present else []),
    ]  # fmt: skip


_NUMBERS = {"zero": 0, "one": 1, "two": 2}


def _range(count: str, name: str) -> list[NodeProto]:
    """0 .. count-1 as int64 [count]."""
    return [
        helper.make_node("Squeeze", [count], [f"{name}_end"]),
        helper.make_node("Squeeze", ["zero"], [f"{name}_start"]),
        helper.make_node("Squeeze", ["one"], [f"{name}_step"]),
        helper.make_node("Range", [f"{name}_start", f"{name}_end", f"{name}_step"], [name]),
    ]


def _token_graph() -> object:
    """One token. t int64 -> y [B,C]; history, filter and the rows of the first token are captured."""
    nodes = [
        helper.make_node("Add", ["before_first", "t"], ["row"]),  # [B,n], row of each tap
        helper.make_node("GreaterOrEqual", ["row", "zero"], ["there"]),
        helper.make_node("Unsqueeze", ["there", "two"], ["there_column"]),
        helper.make_node("Max", ["row", "zero"], ["safe"]),
        helper.make_node("Unsqueeze", ["safe", "two"], ["index"]),
        helper.make_node("GatherND", ["present", "index"], ["read"], batch_dims=1),  # [B,n,C]
        helper.make_node("Where", ["there_column", "read", "nothing"], ["inputs"]),
        helper.make_node("Mul", ["near", "inputs"], ["products"]),
        helper.make_node("ReduceSum", ["products", "one"], ["y_t"], keepdims=0),
    ]
    t = helper.make_tensor_value_info("t", TensorProto.INT64, None)
    y = helper.make_tensor_value_info("y_t", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "token", [t], [y])


OP = Op("LongConvStep", DOC, INPUTS, OUTPUTS, {}, infer, variant, body, long_conv)
