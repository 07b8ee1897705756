"""SparseAttention: causal attention to a prefix, a window and some blocks drawn from what left the window.

Longformer (Beltagy et al. 2020, arXiv 2004.05150) and BigBird (Zaheer et al. 2020, arXiv 2007.14062) made causal, over
a cache that does not grow. B batch, T tokens, H query heads, Hk key/value heads, d head width; a cache of N rows:

  G rows of the prefix      row p holds token p < G, which all later tokens see
  W rows of the window      row G + (u mod W) holds token G + u
  R rows of the reservoir   R = r b: r blocks of b tokens that have left the window

Token p sees itself, the prefix, the tokens p-W+1 .. p, and the reservoir. Token G + u leaves the window when token
G + u + W arrives. Block j = u // b of the tokens behind the prefix is then kept in the place `draw(j)`, token by token,
over what lay there, or is forgotten for ever. The first N tokens fill the rows in order, so that what a token p sees
are the rows 0 .. min(p, N-1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper

from edgeseq.ops.definition import Attributes, Op, Param, Shape, attribute_ref, unify

DOC = """Causal attention to a prefix, a window and a reservoir of blocks that left the window, T >= 1 tokens.

past_k and past_v hold `prefix` rows, then W of the window, then `blocks` * `block` rows of the reservoir. Each token is
written first: token p < prefix to row p, token prefix + u to row prefix + (u mod W); the token it replaces there,
prefix + u - W of block j = (u - W) / block, goes to the reservoir's block draw(j) if draw(j) < blocks:

  z = (48271 (j + 1) + 69621 (seed + 1)) mod M;  z = (z z + 12345) mod M;  z = (z z + 54321) mod M;  M = 2^31 - 1
  draw(j) = j where j < blocks, else z mod (j + 1)

which keeps each of the blocks that have left with equal probability (Vitter 1985, algorithm R). Then
o = softmax(scale q K^T over rows 0 .. min(p, N-1)) V. Query head h reads key/value head h / (H/Hk).
"""

MODULUS = (1 << 31) - 1
FACTORS = (48271, 69621)
SHIFTS = (12345, 54321)
LARGEST_SEED = (1 << 20) - 1

INPUTS = (
    Param("q", "[B,T,Q]", "queries, H heads of width d"),
    Param("k", "[B,T,C]", "keys, Hk heads of width d"),
    Param("v", "[B,T,C]", "values, Hk heads of width d"),
    Param("past_k", "[B,Hk,N,d]", "keys before the first token"),
    Param("past_v", "[B,Hk,N,d]", "values before the first token"),
    Param("position", "[B]", "tokens seen so far", type="int64"),
)
OUTPUTS = (
    Param("o", "[B,T,Q]", "weighted values"),
    Param("present_k", "[B,Hk,N,d]", "keys after the last token"),
    Param("present_v", "[B,Hk,N,d]", "values after the last token"),
)


def draw(j: Any, blocks: int, seed: int) -> Any:
    """Where block j is kept when it leaves the window; `blocks` or more means that it is forgotten.

    j: a whole number >= 0, or an int64 array or tensor of such.
    """
    z = (FACTORS[0] * (j + 1) + FACTORS[1] * (seed + 1)) % MODULUS
    for shift in SHIFTS:
        z = (z * z + shift) % MODULUS
    return (j < blocks) * j + (j >= blocks) * (z % (j + 1))


def sparse_attention(
    q: NDArray, k: NDArray, v: NDArray, past_k: NDArray, past_v: NDArray, position: NDArray,
    num_heads: int, num_kv_heads: int, scale: float, prefix: int = 0, block: int = 1, blocks: int = 0, seed: int = 0,
) -> tuple[NDArray, NDArray, NDArray]:  # fmt: skip
    """The definition, token by token, in the dtype of `q` (float64 decides). Rows that hold no token are not read."""
    batch, tokens, _ = q.shape
    heads = q.reshape(batch, tokens, num_heads, -1)  # [B,T,H,d]
    caches = [past.astype(q.dtype) for past in (past_k, past_v)]
    new = [x.reshape(batch, tokens, num_kv_heads, -1) for x in (k, v)]
    rows = past_k.shape[2]
    window = rows - prefix - block * blocks
    o = np.empty_like(heads)
    for b in range(batch):
        for t in range(tokens):
            p = int(position[b]) + t
            u = p - prefix
            row = p if p < prefix else prefix + u % window
            kept = rows
            if blocks and u >= window:
                place = draw((u - window) // block, blocks, seed)
                kept = prefix + window + place * block + (u - window) % block if place < blocks else rows
            for cache, x in zip(caches, new, strict=True):
                if kept < rows:
                    cache[b, :, kept] = cache[b, :, row]
                cache[b, :, row] = x[b, t]
            held = min(p + 1, rows)
            for h in range(num_heads):
                group = h * num_kv_heads // num_heads
                score = caches[0][b, group, :held] @ heads[b, t, h] * scale
                weight = np.exp(score - score.max())
                o[b, t, h] = weight @ caches[1][b, group, :held] / weight.sum()
    return o.reshape(batch, tokens, -1), caches[0], caches[1]


def infer(shapes: dict[str, Shape | None], attributes: Attributes) -> list[Shape]:
    size: dict[str, int | str | None] = {}
    unify(shapes, INPUTS, size)
    heads, kv_heads = int(attributes["num_heads"]), int(attributes["num_kv_heads"])
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    for axis, count in (("Q", heads), ("C", kv_heads)):
        width, each = size[axis], size["d"]
        if isinstance(width, int) and isinstance(each, int) and width != count * each:
            raise ValueError(f"{count} heads of width {each} are not {width} channels")
    if isinstance(size["Hk"], int) and size["Hk"] != kv_heads:
        raise ValueError(f"past_k has {size['Hk']} heads, but num_kv_heads is {kv_heads}")
    prefix, block, blocks = (int(attributes[name]) for name in ("prefix", "block", "blocks"))
    if prefix < 0 or block < 1 or blocks < 0 or not 0 <= int(attributes["seed"]) <= LARGEST_SEED:
        raise ValueError(f"prefix {prefix}, block {block}, blocks {blocks} and the seed are out of range")
    window = size["N"] - prefix - block * blocks if isinstance(size["N"], int) else None
    if window is not None and (window < 1 or (blocks and window % block)):
        raise ValueError(f"a cache of {size['N']} rows leaves {window} to the window, wanted whole blocks of {block}")
    cache = (size["B"], size["Hk"], size["N"], size["d"])
    return [(size["B"], size["T"], size["Q"]), cache, cache]


def variant(present: frozenset[str], attributes: Attributes) -> str:
    return "drawn" if attributes["blocks"] else ""


def body(present: frozenset[str], attributes: Attributes) -> list[NodeProto]:
    """Scan over T of the caches and the position; sizes are read off the cache's shape."""

    def number(name: str, attribute: str) -> NodeProto:
        node = helper.make_node("Constant", [], [name])
        node.attribute.append(attribute_ref("value_int", attribute, AttributeProto.INT))
        return node

    scan = helper.make_node(
        "Scan", ["past_k", "past_v", "position", "q", "k", "v"], ["present_k", "present_v", "end", "o"],
        body=_token_graph(bool(attributes["blocks"])), num_scan_inputs=3, scan_input_axes=[1, 1, 1],
        scan_output_axes=[1],
    )  # fmt: skip
    return [
        *(number(name, name) for name in ("prefix", "block", "blocks", "seed")),
        *(_constant(name, value) for name, value in (("one", 1), ("zero", 0), ("two", 2), ("three", 3))),
        _constant("apart", [0, -1, 1]),
        _constant("alone", [1]),
        _constant("column", [-1, 1, 1, 1]),
        helper.make_node("Shape", ["past_k"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "two"], ["rows"]),
        helper.make_node("Gather", ["sizes", "three"], ["width"]),
        helper.make_node("Reshape", ["width", "alone"], ["width_1"]),
        helper.make_node("Concat", ["apart", "width_1"], ["by_heads"], axis=0),
        helper.make_node("Mul", ["block", "blocks"], ["reservoir"]),
        helper.make_node("Add", ["prefix", "reservoir"], ["outside"]),
        helper.make_node("Sub", ["rows", "outside"], ["window"]),
        helper.make_node("Range", ["zero", "rows", "one"], ["every_row"]),
        scan,
    ]


def _constant(name: str, value: int | list[int]) -> NodeProto:
    return helper.make_node("Constant", [], [name], **{"value_int" if isinstance(value, int) else "value_ints": value})


def _token_graph(drawn: bool) -> object:
    """One token. K, V [B,Hk,N,d], p [B], q, k, v [B,.] -> K', V', p + 1, o [B,.]; the sizes are captured."""
    n = helper.make_node
    nodes = [
        n("Sub", ["p", "prefix"], ["u"]),
        n("Mod", ["u", "window"], ["turn"]),
        n("Add", ["turn", "prefix"], ["ring_row"]),
        n("Less", ["p", "prefix"], ["early"]),
        n("Where", ["early", "p", "ring_row"], ["row"]),
        n("Reshape", ["k_t", "by_heads"], ["k_row"]),
        n("Reshape", ["v_t", "by_heads"], ["v_row"]),
        n("Reshape", ["q_t", "by_heads"], ["q_row"]),
    ]
    source = ("K", "V")
    if drawn:
        nodes += _move()
        source = ("K_kept", "V_kept")
    attention = n("Attention", ["q_row", "K_next", "V_next", "visible"], ["o_row"])
    attention.attribute.append(attribute_ref("scale", "scale", AttributeProto.FLOAT))
    nodes += [
        n("TensorScatter", [source[0], "k_row", "row"], ["K_next"], axis=2),
        n("TensorScatter", [source[1], "v_row", "row"], ["V_next"], axis=2),
        n("Add", ["p", "one"], ["p_next"]),
        n("Reshape", ["p_next", "column"], ["held"]),
        n("Less", ["every_row", "held"], ["visible"]),
        attention,
        n("Shape", ["q_t"], ["q_shape"]),
        n("Reshape", ["o_row", "q_shape"], ["o_t"]),
    ]

    def value(name: str, kind: int = TensorProto.FLOAT) -> object:
        return helper.make_tensor_value_info(name, kind, None)

    inputs = [value("K"), value("V"), value("p", TensorProto.INT64), *(value(x) for x in ("q_t", "k_t", "v_t"))]
    outputs = [value("K_next"), value("V_next"), value("p_next", TensorProto.INT64), value("o_t")]
    return helper.make_graph(nodes, "token", inputs, outputs)


def _move() -> list[NodeProto]:
    """The row that the token replaces, copied to where it is kept: to itself where nothing left or nothing is kept."""
    n = helper.make_node
    nodes = [
        n("Sub", ["u", "window"], ["left"]),
        n("Max", ["left", "zero"], ["left_0"]),
        n("Div", ["left_0", "block"], ["j"]),
        n("Mod", ["left_0", "block"], ["offset"]),
        n("Add", ["j", "one"], ["j_1"]),
        n("Add", ["seed", "one"], ["seed_1"]),
        *(_constant(f"factor_{i}", f) for i, f in enumerate(FACTORS)),
        *(_constant(f"shift_{i}", s) for i, s in enumerate(SHIFTS)),
        _constant("modulus", MODULUS),
        n("Mul", ["j_1", "factor_0"], ["mixed_j"]),
        n("Mul", ["seed_1", "factor_1"], ["mixed_seed"]),
        n("Add", ["mixed_j", "mixed_seed"], ["mixed"]),
        n("Mod", ["mixed", "modulus"], ["z_0"]),
    ]
    for i in range(len(SHIFTS)):
        nodes += [
            n("Mul", [f"z_{i}", f"z_{i}"], [f"square_{i}"]),
            n("Add", [f"square_{i}", f"shift_{i}"], [f"shifted_{i}"]),
            n("Mod", [f"shifted_{i}", "modulus"], [f"z_{i + 1}"]),
        ]
    nodes += [
        n("Mod", [f"z_{len(SHIFTS)}", "j_1"], ["drawn"]),
        n("Less", ["j", "blocks"], ["filling"]),
        n("Where", ["filling", "j", "drawn"], ["place"]),
        n("Less", ["place", "blocks"], ["inside"]),
        n("GreaterOrEqual", ["left", "zero"], ["gone"]),
        n("And", ["inside", "gone"], ["kept"]),
        n("Mul", ["place", "block"], ["place_row"]),
        n("Add", ["place_row", "offset"], ["place_offset"]),
        n("Add", ["prefix", "window"], ["before"]),
        n("Add", ["place_offset", "before"], ["kept_row"]),
        n("Where", ["kept", "kept_row", "row"], ["target"]),
        n("Reshape", ["row", "column"], ["row_4"]),
        n("Shape", ["k_row"], ["row_shape"]),
        n("Expand", ["row_4", "row_shape"], ["row_index"]),
    ]
    for cache in ("K", "V"):
        nodes += [
            n("GatherElements", [cache, "row_index"], [f"{cache}_old"], axis=2),
            n("TensorScatter", [cache, f"{cache}_old", "target"], [f"{cache}_kept"], axis=2),
        ]
    return nodes


ATTRIBUTES: dict[str, tuple[int | float, str]] = {
    "num_heads": (1, "query heads"),
    "num_kv_heads": (1, "key/value heads"),
    "scale": (1.0, "what scores are multiplied by"),
    "prefix": (0, "rows of the prefix"),
    "block": (1, "tokens of a block"),
    "blocks": (0, "blocks of the reservoir"),
    "seed": (0, "of the draws"),
}
OP = Op("SparseAttention", DOC, INPUTS, OUTPUTS, ATTRIBUTES, infer, variant, body, sparse_attention)
