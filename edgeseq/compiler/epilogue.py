"""What may follow a product and is done while its result is in registers: a bias and a residual."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from .graph import Graph, Node


@dataclass(frozen=True)
class Epilogue:
    """`nodes` absorbed after the product, whose last result is `out`; names of bias and residual, or empty."""

    nodes: tuple[Node, ...]
    out: str
    bias: str
    residual: str


def absorb(graph: Graph, out: str, bias: str = "", taken: Set[Node] = frozenset()) -> Epilogue:
    """Follow the product `out` [.., M] through Add(bias [M]) and one Add(residual of its own shape).

    taken: nodes that others have claimed; where two products meet in one Add, the first has it.
    """
    nodes: list[Node] = []
    residual = ""
    while not residual and (add := graph.sole_consumer(out)) is not None and add.op == "Add" and add not in taken:
        other = add.inputs[1] if add.inputs[0] == out else add.inputs[0]
        if not bias and other in graph.weights and graph.types[other] == ("float32", graph.shape(out)[-1:]):
            bias = other
        elif other not in graph.weights and graph.types[other] == graph.types[out]:
            residual = other
        else:
            break
        nodes.append(add)
        out = add.outputs[0]
    return Epilogue(tuple(nodes), out, bias, residual)
