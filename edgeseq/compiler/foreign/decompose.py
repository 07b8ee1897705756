"""Operators that neither a rule nor TVM knows, or that say plainly less than they could, in operators that do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgeseq.errors import CompileError

from .build import Build, constant_of
from .recurrent import gru, lstm, rnn
from .shapes import static_shape

Decomposer = Callable[[ir.Node, Build, str], "list[ir.Value] | None"]


def decompose(model: ir.Model, label: str) -> bool:
    """Replace nodes in place; whether there were any."""
    found = False
    for node in list(model.graph):
        if node.domain in ("", "ai.onnx") and node.op_type in _DECOMPOSERS:
            build = Build(node)
            results = _DECOMPOSERS[node.op_type](node, build, label)
            if results is not None:
                build.replace(results)
                found = True
    return found


def _gather(node: ir.Node, build: Build, label: str) -> list[ir.Value] | None:
    """One constant index picks a window: a Slice moves no data."""
    x, index = node.inputs[0], constant_of(node.inputs[1])
    shape = static_shape(x) if x is not None else None
    if shape is None or index is None or index.size != 1 or constant_of(x) is not None:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    axis %= len(shape)
    at = int(index.reshape(-1)[0])
    if not -shape[axis] <= at < shape[axis]:
        raise CompileError(f"{label}: a Gather picks index {at} of {shape[axis]}")
    at %= shape[axis]
    window = build.op("Slice", x, build.const([at]), build.const([at + 1]), build.const([axis]))
    if index.ndim == 1:
        return [window]
    picked = build.op("Squeeze", window, build.const([axis]))
    return [
        picked if index.ndim == 0 else build.op("Unsqueeze", picked, build.const([axis + i for i in range(index.ndim)]))
    ]


def _lp_normalization(node: ir.Node, build: Build, label: str) -> list[ir.Value] | None:
    """x / ||x||_p along one axis; a zero vector stays zero."""
    x = node.inputs[0]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    p = node.attributes["p"].as_int() if "p" in node.attributes else 2
    assert x is not None and x.dtype is not None
    dtype = x.dtype.numpy()
    norm = build.op("ReduceL1" if p == 1 else "ReduceL2", x, build.const([axis]), keepdims=1)
    is_zero = build.op("Equal", norm, build.const(0, dtype))
    return [build.op("Div", x, build.op("Where", is_zero, build.const(1, dtype), norm))]


def _celu(node: ir.Node, build: Build, label: str) -> list[ir.Value] | None:
    """max(0, x) + min(0, alpha (exp(x / alpha) - 1))"""
    alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
    scale = build.const(alpha, np.float32)
    scaled = build.op("Elu", build.op("Div", node.inputs[0], scale), alpha=1.0)
    return [build.op("Mul", scaled, scale)]


def _swish(node: ir.Node, build: Build, label: str) -> list[ir.Value] | None:
    """x sigmoid(alpha x)"""
    x = node.inputs[0]
    alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
    assert x is not None and x.dtype is not None
    inner = x if alpha == 1.0 else build.op("Mul", x, build.const(alpha, x.dtype.numpy()))
    return [build.op("Mul", x, build.op("Sigmoid", inner))]


_DECOMPOSERS: dict[str, Decomposer] = {
    "LSTM": lstm, "GRU": gru, "RNN": rnn, "Gather": _gather, "LpNormalization": _lp_normalization, "Celu": _celu,
    "Swish": _swish,
}  # fmt: skip
