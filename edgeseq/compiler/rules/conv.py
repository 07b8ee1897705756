"""Conv over time or over two axes with a constant weight, plus the Relu that follows it -> kernels/conv."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef, Value
from ..kernels.conv import Conv
from . import Claim, Rule
from .linear import FLOATS

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering

MAX_EDGE_TAPS = 4096
"""Taps at the padded edges are written out one by one."""


def _two(values: list[int] | None, n: int) -> tuple[int, int]:
    """An attribute of `n` axes as (rows, columns)."""
    given = list(values) if values else [1] * n
    return (1, given[0]) if n == 1 else (given[0], given[1])


def _pads(
    node: Node,
    x: tuple[int, ...],
    y: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Padding before the first row and column; what comes after follows from the shapes."""
    n = len(x) - 2
    mode = node.attrs.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = list(node.attrs.get("pads") or [0] * (2 * n))
        return (0, pads[0]) if n == 1 else (pads[0], pads[1])
    if mode == "VALID":
        return (0, 0)
    before = []
    for axis in range(n):
        at = axis if n == 2 else 1
        total = max(0, (y[2 + axis] - 1) * stride[at] + (kernel[at] - 1) * dilation[at] + 1 - x[2 + axis])
        before.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
    return (0, before[0]) if n == 1 else (before[0], before[1])


def _params(low: Lowering, node: Node) -> Conv | None:
    graph = low.graph
    x, y, w = (graph.shape(name) for name in (node.inputs[0], node.outputs[0], node.inputs[1]))
    n = len(x) - 2
    weight = graph.weights.get(node.inputs[1])
    if (
        n not in (1, 2)
        or x[0] != 1
        or weight is None
        or weight.dtype not in FLOATS
        or graph.dtype(node.inputs[0]) != "float32"
    ):
        return None
    groups = int(node.attrs.get("group", 1))
    kernel, stride, dilation = (
        _two(v, n) for v in (list(w[2:]), node.attrs.get("strides"), node.attrs.get("dilations"))
    )
    rows, columns = (1, x[2]) if n == 1 else (x[2], x[3])
    out_rows, out_columns = (1, y[2]) if n == 1 else (y[2], y[3])
    if groups > 1 and (w[0] // groups) % 16:
        return None
    pad = _pads(node, x, y, kernel, stride, dilation)
    return Conv(
        x[1], w[0], rows, columns, out_rows, out_columns, *kernel, *stride, *dilation, *pad, groups, weight.dtype,
        tile=low.target.gemm_tile[0],
    )  # fmt: skip


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    params = _params(low, node)
    if params is None or (bias and bias not in graph.weights):
        return None
    begin, end = params.interior()
    if (begin + params.OW - end) * params.KW > MAX_EDGE_TAPS:
        return None
    relu = graph.sole_consumer(node.outputs[0])
    claimed, out = [node], node.outputs[0]
    if relu is not None and relu.op == "Relu" and relu not in low.taken:
        claimed.append(relu)
        out = relu.outputs[0]
    x, w = node.inputs[0], node.inputs[1]
    final = replace(params, bias=bool(bias), act="relu" if len(claimed) > 1 else "none")

    def emit() -> None:
        source = graph.weights[w]
        flat = replace(source, shape=(final.M, math.prod(source.shape[1:])))
        weight = Value(w, flat.dtype, flat.shape, low.memory.weight("rows16", flat))
        optional = [Arg(low.weight(bias, "plain"), "r")] if bias else []
        low.call(
            KernelRef("conv", final), Arg(low.dense(x), "r"), Arg(weight, "r"), *optional, Arg(low.result(out), "w")
        )

    return Claim(tuple(claimed), (x,), emit)


RULE = Rule(("Conv",), _match)
