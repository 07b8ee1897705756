"""CausalConvWithState between transposes (standard) or channels-last (com.microsoft) -> kernels/causal_conv."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Arg, KernelRef
from ..kernels.causal_conv import CausalConv
from . import Claim, Rule

if TYPE_CHECKING:
    from ..graph import Node
    from ..lowering import Lowering


def _swap_before(low: Lowering, name: str) -> str | None:
    """The input of the Transpose(0,2,1) that makes `name`."""
    node = low.graph.producer.get(name)
    return node.inputs[0] if node is not None and node.attrs.get("perm") == [0, 2, 1] else None


def _swap_after(low: Lowering, name: str) -> Node | None:
    node = low.graph.sole_consumer(name)
    return node if node is not None and node.attrs.get("perm") == [0, 2, 1] else None


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    x, w, bias, past = (*node.inputs, "", "")[:4]
    y, present = node.outputs
    claimed = [node]
    if node.attrs.get("activation", "none") not in ("none", "silu", "swish") or not past:
        return None
    if not node.attrs.get("channels_last", 0):
        before, state = _swap_before(low, x), _swap_before(low, past)
        after, kept = _swap_after(low, y), _swap_after(low, present)
        if before is None or state is None or after is None or kept is None:
            return None
        claimed += [after, kept]
        x, past, y, present = before, state, after.outputs[0], kept.outputs[0]
    if w in graph.producer:  # [C,k] -> [C,1,k]
        w = graph.producer[w].inputs[0]
    if w not in graph.weights or not low.owns_state(past, present, tuple(claimed)):
        return None

    def emit() -> None:
        xv, state = low.rows(x), low.state(past, present)
        weight = low.weight(w, "transposed")
        k = graph.shape(w)[-1]
        params = CausalConv(xv.rows, xv.cols, k, xv.ld, bool(bias), node.attrs.get("activation", "none") != "none")
        optional = [Arg(low.weight(bias, "plain"), "r")] if bias else []
        low.call(
            KernelRef("causal_conv", params), Arg(xv, "r"), Arg(weight, "r"), *optional, Arg(state, "rw"),
            Arg(low.result(y), "w"),
        )  # fmt: skip

    return Claim(tuple(claimed), (x, past), emit)


RULE = Rule(("CausalConvWithState", "com.microsoft.CausalConvWithState"), _match)
