"""CumSum and CumProd along a constant axis -> kernels/cumulative."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.cumulative import DTYPES, Cumulative
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    x, where = node.inputs[0], low.graph.constant(node.inputs[1])
    shape, dtype = low.graph.shape(x), low.graph.dtype(x)
    if where is None or where.size != 1 or dtype not in DTYPES or not shape:
        return None
    axis = int(where.reshape(())) % len(shape)

    def emit() -> None:
        value = low.rows(x)
        params = Cumulative(
            math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]), value.cols, value.ld,
            node.op == "CumProd", bool(node.attrs.get("exclusive", 0)), bool(node.attrs.get("reverse", 0)), dtype,
        )  # fmt: skip
        low.call(KernelRef("cumulative", params), Arg(value, "r"), Arg(low.result(node.outputs[0]), "w"))

    return Claim((node,), (x,), emit)


RULE = Rule(("CumSum", "CumProd"), _match)
