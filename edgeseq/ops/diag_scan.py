"""DiagScan: a diagonal complex state space model in modal form (S4D, Gu et al. 2022, arXiv 2206.11893, section 3; GSS,
Mehta et al. 2022; the modal form of a distilled long convolution, Massaroli et al. 2023, arXiv 2310.18780, section 3).

B batch, T tokens, C channels, N modes. A complex number is two rows, real and imaginary, before the channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, unify

DOC = """N complex modes per channel over T >= 1 tokens from an explicit state; they do not depend on the token.

  x_n = a_n x_n + u_t                                          x, a, c complex; u, y, d real; per channel
  y_t = Re(sum_n c_n x_n) + d u_t                              after the update

The input factor of a state space model is part of c: with x' = a x + b u, c b stands for c. Where a has one channel,
all channels share it. |a| <= 1 keeps the state bounded.
"""

INPUTS = (
    Param("u", "[B,T,C]", "input"),
    Param("a", "[N,2,A]", "poles, real and imaginary; A is C, or 1 where all channels share them"),
    Param("c", "[N,2,C]", "residues, real and imaginary"),
    Param("d", "[C]", "skip connection", optional=True),
    Param("past", "[B,N,2,C]", "state before the first token"),
)
OUTPUTS = (Param("y", "[B,T,C]", "output"), Param("present", "[B,N,2,C]", "state after the last token"))


def diag_scan(
    u: NDArray, a: NDArray, c: NDArray, d: NDArray | None = None, past: NDArray | None = None
) -> tuple[NDArray, NDArray]:
    """The definition, token by token, in the dtype of `u` (float64 decides). No past means zeros."""
    batch, tokens, _ = u.shape
    state = np.zeros((batch, *c.shape), u.dtype) if past is None else past.astype(u.dtype)
    re, im = state[:, :, 0], state[:, :, 1]  # [B,N,C]
    y = np.empty_like(u)
    for t in range(tokens):
        re, im = a[:, 0] * re - a[:, 1] * im + u[:, t, None], a[:, 0] * im + a[:, 1] * re
        y[:, t] = (c[:, 0] * re - c[:, 1] * im).sum(1)
    if d is not None:
        y = y + d * u
    return y, np.stack([re, im], 2)


def infer(shapes: dict[str, Shape | None], attributes: Attributes) -> list[Shape]:
    size: dict[str, int | str | None] = {"2": 2}
    unify(shapes, INPUTS, size)
    poles, channels = size["A"], size["C"]
    if isinstance(poles, int) and isinstance(channels, int) and poles not in (1, channels):
        raise ValueError(f"a has {poles} channels, wanted 1 or {channels}")
    return [(size["B"], size["T"], size["C"]), (size["B"], size["N"], 2, size["C"])]


def variant(present: frozenset[str], attributes: Attributes) -> str:
    return "" if "d" in present else "no_d"


def body(present: frozenset[str], attributes: Attributes) -> list[NodeProto]:
    """Scan over T of the real and the imaginary state [B,N,C]; the skip is vectorised outside."""
    nodes = [
        helper.make_node("Constant", [], ["part_of_weight"], value_ints=[1]),
        helper.make_node("Constant", [], ["part_of_state"], value_ints=[2]),
    ]
    for name, axis in (("a", 1), ("c", 1), ("past", 2)):
        squeezed = "part_of_weight" if axis == 1 else "part_of_state"
        nodes.append(helper.make_node("Split", [name], [f"{name}_r", f"{name}_i"], axis=axis, num_outputs=2))
        nodes += [helper.make_node("Squeeze", [f"{name}_{p}", squeezed], [f"{name}_{p}e"]) for p in "ri"]
    scan = helper.make_node(
        "Scan", ["past_re", "past_ie", "u"], ["present_re", "present_ie", "read"],
        body=_token_graph(), num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1],
    )  # fmt: skip
    nodes.append(scan)
    if "d" in present:
        nodes.append(helper.make_node("Mul", ["d", "u"], ["skip"]))
        nodes.append(helper.make_node("Add", ["read", "skip"], ["y"]))
    else:
        scan.output[2] = "y"
    nodes += [helper.make_node("Unsqueeze", [f"present_{p}e", "part_of_state"], [f"present_{p}"]) for p in "ri"]
    return [*nodes, helper.make_node("Concat", ["present_r", "present_i"], ["present"], axis=2)]


def _token_graph() -> object:
    """One token. re, im [B,N,C], u [B,C] -> re', im', y [B,C]; a and c are captured."""

    def value(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    nodes = [helper.make_node("Constant", [], ["one"], value_ints=[1])]
    products = {
        "a_re": ("rr", "re"), "a_ie": ("ii", "im"), "a_re ": ("ri", "im"), "a_ie ": ("ir", "re"),
    }  # fmt: skip
    nodes += [helper.make_node("Mul", [a.strip(), x], [name]) for a, (name, x) in products.items()]
    nodes += [
        helper.make_node("Sub", ["rr", "ii"], ["re_kept"]),
        helper.make_node("Unsqueeze", ["u_t", "one"], ["u_row"]),  # [B,1,C]
        helper.make_node("Add", ["re_kept", "u_row"], ["re_next"]),
        helper.make_node("Add", ["ri", "ir"], ["im_next"]),
        helper.make_node("Mul", ["c_re", "re_next"], ["read_re"]),
        helper.make_node("Mul", ["c_ie", "im_next"], ["read_im"]),
        helper.make_node("Sub", ["read_re", "read_im"], ["read_modes"]),
        helper.make_node("ReduceSum", ["read_modes", "one"], ["y_t"], keepdims=0),
    ]
    inputs = [value(name) for name in ("re", "im", "u_t")]
    return helper.make_graph(nodes, "token", inputs, [value(n) for n in ("re_next", "im_next", "y_t")])


OP = Op("DiagScan", DOC, INPUTS, OUTPUTS, {}, infer, variant, body, diag_scan)
