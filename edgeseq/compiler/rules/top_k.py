"""TopK with a constant k -> kernels/top_k; unsorted results are sorted as well."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.top_k import DTYPES, TopK
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    x, count = node.inputs[0], low.graph.constant(node.inputs[1])
    shape, dtype = low.graph.shape(x), low.graph.dtype(x)
    if count is None or dtype not in DTYPES or not shape:
        return None
    axis = int(node.attrs.get("axis", -1)) % len(shape)
    k = int(count.reshape(()))
    if not 1 <= k <= shape[axis]:
        return None

    def emit() -> None:
        value = low.rows(x)
        params = TopK(
            math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]), k, value.cols, value.ld,
            bool(node.attrs.get("largest", 1)), dtype,
        )  # fmt: skip
        outputs = [Arg(low.result(name), "w") for name in node.outputs]
        low.call(KernelRef("top_k", params), Arg(value, "r"), *outputs)

    return Claim((node,), (x,), emit)


RULE = Rule(("TopK",), _match)
