"""ExpertLinearNBits: ExpertLinear with 8- or 4-bit matrices in blocks of 32, coded as MatMulNBits codes them.

Letters as in `expert_linear.py`; N blocks of a row, C bytes of the codes of a block (32, or 16 with two codes a byte,
the first in the low half).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, unify
from edgeseq.ops.expert_linear import INPUTS as PLAIN
from edgeseq.ops.expert_linear import OUTPUTS, expert_linear, finish, outputs, product, scan, stacked

BLOCK = 32

DOC = """ExpertLinear with W[m,k] = scales[m,k/32] (code[m,k] - 128), or - 8 for 4 bits; what pads a row is not read."""

INPUTS = (
    *PLAIN[:2],
    Param("codes", "[EM,N,C]", "codes of all experts, one below the other", type="uint8"),
    Param("scales", "[EM,N]", "their scales"),
    PLAIN[3],
)
ATTRIBUTES: dict[str, tuple[int | float, str]] = {
    "num_experts": (1, "E, the number of experts."),
    "bits": (4, "Bits of a code, 4 or 8."),
}


def expert_linear_nbits(
    x: NDArray,
    index: NDArray,
    codes: NDArray,
    scales: NDArray,
    gates: NDArray | None = None,
    num_experts: int = 1,
    bits: int = 4,
) -> tuple[NDArray]:
    """The definition, in the dtype of `x` (float64 decides)."""
    wide = codes.astype(np.int16)
    if bits == 4:
        wide = np.stack([wide & 15, wide >> 4], -1).reshape(*wide.shape[:2], BLOCK)
    w = (wide - (1 << (bits - 1))) * scales.astype(x.dtype)[..., None]
    return expert_linear(x, index, w.reshape(len(w), -1)[:, : x.shape[-1]], gates, num_experts)


def infer(shapes: dict[str, Shape | None], attributes: Attributes) -> list[Shape]:
    bits = int(attributes["bits"])
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, wanted 4 or 8")
    size: dict[str, int | str | None] = {"C": 4 * bits}
    unify(shapes, INPUTS, size)
    k, n = size["K"], size["N"]
    if isinstance(k, int) and isinstance(n, int) and -(-k // BLOCK) != n:
        raise ValueError(f"{n} blocks of {BLOCK} for rows of {k}")
    return outputs(size, "EM", shapes["gates"] is not None, attributes)


def variant(present: frozenset[str], attributes: Attributes) -> str:
    return f"{attributes['bits']}bit" + ("_combined" if "gates" in present else "")


def body(present: frozenset[str], attributes: Attributes) -> list[NodeProto]:
    """Scan over T: codes and scales of the chosen experts are gathered, then widened."""
    bits = int(attributes["bits"])
    token = [
        helper.make_node("Gather", ["coded", "index_t"], ["chosen_codes"], axis=0),  # [B,A,M,N,C]
        helper.make_node("Gather", ["scaled", "index_t"], ["chosen_scales"], axis=0),  # [B,A,M,N]
        *(_nibbles() if bits == 4 else []),
        helper.make_node("Cast", ["separate" if bits == 4 else "chosen_codes"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["middle"], value_float=float(1 << (bits - 1))),
        helper.make_node("Sub", ["numbers", "middle"], ["signed"]),
        helper.make_node("Constant", [], ["inner"], value_ints=[-1]),
        helper.make_node("Unsqueeze", ["chosen_scales", "inner"], ["block_scales"]),
        helper.make_node("Mul", ["signed", "block_scales"], ["blocked"]),  # [B,A,M,N,32]
        helper.make_node("Constant", [], ["joined_shape"], value_ints=[0, 0, 0, -1]),
        helper.make_node("Reshape", ["blocked", "joined_shape"], ["padded"]),
        helper.make_node("Constant", [], ["begin"], value_ints=[0]),
        helper.make_node("Slice", ["padded", "begin", "width", "inner"], ["chosen"]),
        *product("chosen"),
    ]
    return [
        *stacked("codes", "coded", 3),
        *stacked("scales", "scaled"),
        helper.make_node("Shape", ["x"], ["width"], start=3),
        *scan(token),
        *finish("gates" in present),
    ]


def _nibbles() -> list[NodeProto]:
    """Two codes a byte -> [..,32]."""
    return [
        helper.make_node("Constant", [], ["mask"], value=helper.make_tensor("mask", TensorProto.UINT8, [], [15])),
        helper.make_node("Constant", [], ["half"], value=helper.make_tensor("half", TensorProto.UINT8, [], [4])),
        helper.make_node("Constant", [], ["pair"], value_ints=[-1]),
        helper.make_node("BitwiseAnd", ["chosen_codes", "mask"], ["low"]),
        helper.make_node("BitShift", ["chosen_codes", "half"], ["high"], direction="RIGHT"),
        helper.make_node("Unsqueeze", ["low", "pair"], ["low_apart"]),
        helper.make_node("Unsqueeze", ["high", "pair"], ["high_apart"]),
        helper.make_node("Concat", ["low_apart", "high_apart"], ["pairs"], axis=-1),
        helper.make_node("Constant", [], ["separate_shape"], value_ints=[0, 0, 0, 0, -1]),
        helper.make_node("Reshape", ["pairs", "separate_shape"], ["separate"]),
    ]


OP = Op("ExpertLinearNBits", DOC, INPUTS, OUTPUTS, ATTRIBUTES, infer, variant, body, expert_linear_nbits)
