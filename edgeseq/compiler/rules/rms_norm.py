"""RMSNormalization over the last axis -> kernels/rms_norm; a scale of ones costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..ir import Arg, KernelRef
from ..kernels.rms_norm import RmsNorm
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    x, scale = node.inputs
    rank = len(graph.shape(x))
    if int(node.attrs.get("axis", -1)) % rank != rank - 1 or graph.dtype(x) != "float32":
        return None
    if scale not in graph.weights or graph.dtype(scale) != "float32":
        return None
    small = graph.constant(scale)
    ones = small is not None and graph.weights[scale].file is None and bool(np.all(small == 1.0))

    def emit() -> None:
        xv = low.rows(x)
        params = RmsNorm(xv.rows, xv.cols, xv.ld, float(node.attrs.get("epsilon", 1e-5)), not ones)
        weight = [] if ones else [Arg(low.weight(scale, "plain"), "r")]
        low.call(KernelRef("rms_norm", params), Arg(xv, "r"), *weight, Arg(low.result(node.outputs[0]), "w"))

    return Claim((node,), (x,), emit)


RULE = Rule(("RMSNormalization",), _match)
