"""Gather of rows of a weight by token -> kernels/embed, from the table in the layout the output head reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.embed import Embed
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    table, tokens = node.inputs
    cast = None
    if table in graph.producer and graph.producer[table].op == "Cast":
        cast = graph.producer[table]
        table = cast.inputs[0]
    weight = graph.weights.get(table)
    if weight is None or len(weight.shape) != 2 or int(node.attrs.get("axis", 0)) != 0 or tokens in graph.weights:
        return None
    out, claimed = node.outputs[0], [node]
    if cast is None and weight.dtype != "float32":
        after = graph.sole_consumer(out)
        if after is None or after.op != "Cast" or graph.dtype(after.outputs[0]) != "float32":
            return None
        claimed.append(after)
        out = after.outputs[0]

    def emit() -> None:
        m, k = weight.shape
        t = math.prod(graph.shape(tokens))
        w = low.weight(table, "rows16")
        args = (Arg(low.rows(tokens), "r"), Arg(w, "r"), Arg(low.result(out), "w"))
        low.call(KernelRef("embed", Embed(t, m, k, w.dtype)), *args, weights=t * k * w.item_bytes)

    return Claim(tuple(claimed), (tokens,), emit)


RULE = Rule(("Gather",), _match)
