"""LayerNormalization over the last axis -> kernels/layer_norm; a scale of ones and a bias of zeros cost nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..ir import Arg, KernelRef
from ..kernels.layer_norm import LayerNorm
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    x, scale, bias = (*node.inputs, "")[:3]
    rank, width = len(graph.shape(x)), graph.shape(x)[-1:]
    if int(node.attrs.get("axis", -1)) % rank != rank - 1 or graph.dtype(x) != "float32":
        return None
    if any(node.outputs[1:]) or graph.shape(scale) != width or (bias and graph.shape(bias) != width):
        return None
    if any(n not in graph.weights or graph.dtype(n) != "float32" for n in (scale, bias) if n):
        return None
    kept = [n for n, neutral in ((scale, 1.0), (bias, 0.0)) if n and not _all(low, n, neutral)]

    def emit() -> None:
        xv = low.rows(x)
        eps = float(node.attrs.get("epsilon", 1e-5))
        params = LayerNorm(xv.rows, xv.cols, xv.ld, eps, scale in kept, bias in kept)
        weights = [Arg(low.weight(n, "plain"), "r") for n in kept]
        low.call(KernelRef("layer_norm", params), Arg(xv, "r"), *weights, Arg(low.result(node.outputs[0]), "w"))

    return Claim((node,), (x,), emit)


def _all(low: Lowering, name: str, value: float) -> bool:
    """Whether `name` is a constant of the graph itself, every element of it `value`."""
    small = low.graph.constant(name)
    return small is not None and low.graph.weights[name].file is None and bool(np.all(small == value))


RULE = Rule(("LayerNormalization",), _match)
