"""Operators that are rewritten on the way in: old opsets' forms, constant Gathers, what TVM lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from edgeseq.errors import CompileError

from .support import Theirs, compare, model_of, value

Nodes = list[tuple[str, list[str], str, dict[str, Any]]]
SHAPE = [1, 4, 6]
OLD: dict[str, tuple[int, Nodes]] = {
    "slice attributes": (
        9, [("Slice", ["x"], "a", {"starts": [1], "ends": [3], "axes": [1]}), ("ReduceSum", ["a"], "y", {})]
    ),
    "pad attributes": (
        9, [("Pad", ["x"], "a", {"pads": [0, 1, 0, 0, 0, 2], "value": 0.5}), ("ReduceMax", ["a"], "y", {"axes": [1]})]
    ),
    "clip attributes": (9, [("Clip", ["x"], "y", {"min": -0.5, "max": 0.25})]),
    "softmax over what follows": (11, [("Softmax", ["x"], "y", {"axis": 1})]),
    "squeeze attributes": (11, [("Squeeze", ["x"], "a", {"axes": [0]}), ("Unsqueeze", ["a"], "y", {"axes": [1]})]),
    "reduce attributes": (12, [("ReduceMean", ["x"], "y", {"axes": [-1], "keepdims": 0})]),
    "split attribute": (11, [("Split", ["x"], "a", {"axis": 2, "split": [3, 3]}), ("Exp", ["a"], "y", {})]),
    "dropout": (10, [("Dropout", ["x"], "a", {"ratio": 0.5}), ("Identity", ["a"], "c", {}), ("Neg", ["c"], "y", {})]),
    "top k": (10, [("TopK", ["x", "k"], "y", {"axis": -1})]),
    "batch normalization": (8, [("BatchNormalization", ["x", "g", "b", "m", "v"], "y", {"epsilon": 1e-3})]),
    "gemm with a broadcast bias": (
        9, [("Squeeze", ["x"], "a", {"axes": [0]}), ("Gemm", ["a", "w", "one"], "y", {"alpha": 0.5})]
    ),
}  # fmt: skip
NEW: dict[str, tuple[int, Nodes]] = {
    "gather scalar": (21, [("Gather", ["x", "two"], "y", {"axis": 1})]),
    "gather negative": (21, [("Gather", ["x", "last"], "y", {"axis": 2})]),
    "gather list of one": (21, [("Gather", ["x", "listed"], "y", {"axis": 1})]),
    "gather table of one": (21, [("Gather", ["x", "table"], "y", {"axis": 1})]),
    "gather several": (21, [("Gather", ["x", "several"], "y", {"axis": 1})]),
    "celu": (21, [("Celu", ["x"], "y", {"alpha": 0.6})]),
    "lp normalization 1": (21, [("LpNormalization", ["x"], "y", {"p": 1, "axis": 1})]),
    "lp normalization 2": (21, [("LpNormalization", ["x"], "y", {})]),
    "swish": (24, [("Swish", ["x"], "y", {"alpha": 1.5})]),
    "folded shape": (
        21, [("Shape", ["x"], "dims", {}), ("ConstantOfShape", ["dims"], "z", {}), ("Add", ["z", "x"], "y", {})]
    ),
}  # fmt: skip
WEIGHTS = {
    "two": np.int64(2), "last": np.int64(-1), "listed": np.int64([1]), "table": np.int64([[3]]), "k": np.int64([2]),
    "several": np.int64([2, 0, -1]), "g": np.float32([1, 2, 3, 4]), "b": np.float32([0, 1, 0, -1]),
    "m": np.float32([0.5, 0, 0, 1]), "v": np.float32([1, 2, 0.5, 1]), "one": np.float32([1, 2, 3]),
    "rate": np.float32(1.5), "w": np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32),
}  # fmt: skip


def case(opset: int, nodes: Nodes) -> Theirs:
    """x, s -> y of the nodes; the state keeps a running mean of x. The shape of y is left to inference."""
    made = [
        helper.make_node(op, inputs, [out] if op not in ("TopK", "Split") else [out, f"{out}2"], **attributes)
        for op, inputs, out, attributes in nodes
    ]
    made += [helper.make_node("Add", ["x", "s"], ["p"]), helper.make_node("Mul", ["p", "half"], ["sn"])]
    used = {i for _, inputs, _, _ in nodes for i in inputs}
    weights = {n: w for n, w in WEIGHTS.items() if n in used} | {"half": np.float32(0.5)}
    y = helper.make_tensor_value_info("y", 1, None)
    model = model_of(made, [value("x", SHAPE), value("s", SHAPE)], [y, value("sn", SHAPE)], weights, opset)
    return Theirs(model, "s:sn")


@pytest.mark.parametrize("name", OLD | NEW)
def test_as_onnxruntime_says(name: str, tmp_path: Path) -> None:
    theirs = case(*(OLD | NEW)[name])
    if name == "swish":  # onnxruntime 1.32 has no kernel for it: its definition instead
        definition: Nodes = [("Mul", ["x", "rate"], "c", {}), ("Sigmoid", ["c"], "d", {}), ("Mul", ["x", "d"], "y", {})]
        compare(case(21, definition), theirs.read(tmp_path))
        return
    imported = theirs.read(tmp_path)
    compare(theirs, imported)
    if name in ("gather scalar", "gather negative", "gather list of one", "gather table of one"):
        assert "Gather" not in {n.op_type for n in imported.model.graph.node}


def test_a_constant_index_out_of_range_is_refused(tmp_path: Path) -> None:
    theirs = case(21, [("Gather", ["x", "two"], "y", {"axis": 1})])
    for tensor in theirs.model.graph.initializer:
        if tensor.name == "two":
            tensor.raw_data = np.int64(4).tobytes()
    with pytest.raises(CompileError, match=r"picks index 4 of 4|not valid ONNX"):
        theirs.read(tmp_path)
