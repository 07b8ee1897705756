"""ExpertLinear: the linear layer of a mixture of experts (Shazeer et al. 2017, arXiv 1701.06538; Mixtral, Jiang et al.
2024, arXiv 2401.04088, section 2.1). Only the matrices that `index` names are read.

B batch, T tokens, E experts, A experts chosen for a token, S inputs of a token (1, which all of its experts see, or A),
K input width, M output width. The experts' matrices lie one below the other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, attribute_ref, unify

DOC = """Products of each token with the matrices of the experts chosen for it.

  y[b,t,a] = W[index[b,t,a]] x[b,t,a]              W[e] = w[e M : (e+1) M]
  y[b,t]   = sum_a gates[b,t,a] y[b,t,a]           where gates are given

A negative index is no expert: its output is zero. An index of E or more is an error of the caller.
"""

INPUTS = (
    Param("x", "[B,T,S,K]", "inputs; S is 1 where all experts of a token see the same"),
    Param("index", "[B,T,A]", "the experts of each token, negative for none", type="int64"),
    Param("w", "[EM,K]", "matrices of all experts, one below the other"),
    Param("gates", "[B,T,A]", "weights of the sum over the experts of a token", optional=True),
)
OUTPUTS = (Param("y", "[B,T,A,M]", "outputs by expert, or their sum [B,T,M] where gates are given"),)
ATTRIBUTES: dict[str, tuple[int | float, str]] = {"num_experts": (1, "E, the number of experts.")}


def expert_linear(
    x: NDArray, index: NDArray, w: NDArray, gates: NDArray | None = None, num_experts: int = 1
) -> tuple[NDArray]:
    """The definition, expert by expert of every token, in the dtype of `x` (float64 decides)."""
    batch, tokens, chosen = index.shape
    matrices = w.astype(x.dtype).reshape(num_experts, -1, w.shape[-1])
    y = np.zeros((batch, tokens, chosen, matrices.shape[1]), x.dtype)
    for b, t, a in zip(*np.nonzero(index >= 0), strict=True):
        y[b, t, a] = matrices[index[b, t, a]] @ x[b, t, a if x.shape[2] > 1 else 0]
    return (y if gates is None else np.einsum("bta,btam->btm", gates.astype(x.dtype), y),)


def outputs(size: dict[str, int | str | None], rows: str, combined: bool, attributes: Attributes) -> list[Shape]:
    """The shape of y; ValueError where inputs or matrices cannot be shared out among tokens and experts."""
    experts, stacked = int(attributes["num_experts"]), size[rows]
    inputs, chosen = size["S"], size["A"]
    if experts < 1 or (isinstance(stacked, int) and stacked % experts):
        raise ValueError(f"{stacked} rows cannot be the matrices of {experts} experts")
    if isinstance(inputs, int) and isinstance(chosen, int) and inputs not in (1, chosen):
        raise ValueError(f"{inputs} inputs of a token for its {chosen} experts")
    m = stacked // experts if isinstance(stacked, int) else None
    return [(size["B"], size["T"], m) if combined else (size["B"], size["T"], size["A"], m)]


def infer(shapes: dict[str, Shape | None], attributes: Attributes) -> list[Shape]:
    size: dict[str, int | str | None] = {}
    unify(shapes, INPUTS, size)
    return outputs(size, "EM", shapes["gates"] is not None, attributes)


def variant(present: frozenset[str], attributes: Attributes) -> str:
    return "combined" if "gates" in present else ""


def body(present: frozenset[str], attributes: Attributes) -> list[NodeProto]:
    """Scan over T, so that the gathered matrices are those of one token."""
    token = [
        helper.make_node("Gather", ["matrices", "index_t"], ["chosen"], axis=0),  # [B,A,M,K]
        *product("chosen"),
    ]
    return [*stacked("w", "matrices"), *scan(token), *finish("gates" in present)]


def stacked(name: str, result: str, rank: int = 2) -> list[NodeProto]:
    """[E M, ...] -> [E, M, ...]."""
    experts = helper.make_node("Constant", [], [f"{result}_experts"])
    experts.attribute.append(attribute_ref("value_int", "num_experts", AttributeProto.INT))
    return [
        experts,
        helper.make_node("Constant", [], [f"{result}_one"], value_ints=[1]),
        helper.make_node("Constant", [], [f"{result}_rest"], value_ints=[-1]),
        helper.make_node("Reshape", [f"{result}_experts", f"{result}_one"], [f"{result}_first"]),
        helper.make_node("Shape", [name], [f"{result}_last"], start=1, end=rank),
        helper.make_node("Concat", [f"{result}_{n}" for n in ("first", "rest", "last")], [f"{result}_shape"], axis=0),
        helper.make_node("Reshape", [name, f"{result}_shape"], [result]),
    ]


def product(matrices: str) -> list[NodeProto]:
    """y_t [B,A,M] = matrices [B,A,M,K] times x_t [B,S,K]."""
    return [
        helper.make_node("Constant", [], ["last"], value_ints=[-1]),
        helper.make_node("Unsqueeze", ["x_t", "last"], ["column"]),
        helper.make_node("MatMul", [matrices, "column"], ["products"]),
        helper.make_node("Squeeze", ["products", "last"], ["y_t"]),
    ]


def scan(token: list[NodeProto]) -> list[NodeProto]:
    """`token` for every token: x_t [B,S,K] and index_t [B,A] -> y_t [B,A,M], collected as each [B,T,A,M]."""
    inputs = [
        helper.make_tensor_value_info("x_t", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("index_t", TensorProto.INT64, None),
    ]
    graph = helper.make_graph(token, "token", inputs, [helper.make_tensor_value_info("y_t", TensorProto.FLOAT, None)])
    return [
        helper.make_node("Constant", [], ["none"], value_int=0),
        helper.make_node("Max", ["index", "none"], ["readable"]),
        helper.make_node(
            "Scan", ["x", "readable"], ["each"], body=graph, num_scan_inputs=2, scan_input_axes=[1, 1],
            scan_output_axes=[1],
        ),
    ]  # fmt: skip


def finish(combined: bool) -> list[NodeProto]:
    """each -> y: zero where there is no expert, and summed by the gates where there are any."""
    factor = "gates" if combined else "chosen_float"
    nodes = [
        helper.make_node("Constant", [], ["end"], value_ints=[-1]),
        helper.make_node("Constant", [], ["zero"], value_float=0.0),
        helper.make_node("GreaterOrEqual", ["index", "none"], ["is_chosen"]),
        helper.make_node("Cast", ["is_chosen"], ["chosen_float"], to=TensorProto.FLOAT),
        helper.make_node("Where", ["is_chosen", factor, "zero"], ["factor"]),
        helper.make_node("Unsqueeze", ["factor", "end"], ["factors"]),
    ]
    if not combined:
        return [*nodes, helper.make_node("Mul", ["each", "factors"], ["y"])]
    return [
        *nodes,
        helper.make_node("Constant", [], ["chosen_axis"], value_ints=[2]),
        helper.make_node("Mul", ["each", "factors"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "chosen_axis"], ["y"], keepdims=0),
    ]


OP = Op("ExpertLinear", DOC, INPUTS, OUTPUTS, ATTRIBUTES, infer, variant, body, expert_linear)
