"""Mamba-2's recurrence on GPUs: LinearAttention of values dt v and decays dt A[H], with the softplus that makes dt,
D v and the gate by z where they are there -> gpu/linear_attention.SteppedAttention.

A launch of its own for each of them would take longer than the recurrence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..gpu.linear_attention import SteppedAttention
from ..ir import Arg, KernelRef
from ..kernels.linear_attention import token_tile
from . import Claim, Rule
from .glu import gated
from .linear_attention import queries_of, unrepeated

if TYPE_CHECKING:
    from ..graph import Graph, Node
    from ..lowering import Lowering

VIEWS = ("Reshape", "Unsqueeze")


@dataclass(frozen=True)
class _Step:
    """dt: before bias and softplus if there are any."""

    dt: str
    bias: str = ""
    least: float = 0.0
    most: float = math.inf


def _match(low: Lowering, node: Node) -> Claim | None:
    graph = low.graph
    q, k, values, past, decay, beta = (*node.inputs, "", "", "")[:6]
    o, present = (*node.outputs, "")[:2]
    if low.target.gpu is None or node.attrs.get("update_rule") != "gated" or beta or not past or graph.shape(q)[0] != 1:
        return None
    heads, key_width, width = graph.shape(past)[1:]
    found = by_head(graph, values, heads, width)
    dt, v = found if found else ("", "")
    A = _product_with_weight(graph, decay, dt, heads) if dt else ""
    q_heads = int(node.attrs["q_num_heads"])
    if not A or graph.dtype(v) != "float32" or q_heads > heads:
        return None
    nodes: tuple[Node, ...] = (node,)
    D = z = ""
    add = graph.sole_consumer(o)
    if add is not None and add.op == "Add":
        skipped = by_head(graph, _other(add, o), heads, width)
        if skipped and skipped[1] == v and _vector(graph, skipped[0], heads):
            D, o, nodes = skipped[0], add.outputs[0], (*nodes, add)
    gate = _gate(graph, o)
    if gate is not None and not set(gate[1]) & low.taken:
        z, nodes = gate[0], (*nodes, *gate[1])
        o = gate[1][-1].outputs[0]
    if not low.owns_state(past, present, (node,)):
        return None
    step = _step_size(graph, dt, heads)
    (q, q_heads), (k, k_heads) = queries_of(low, q, q_heads, heads), unrepeated(low, k, heads)

    def emit() -> None:
        qv, kv, vv, dv = (low.rows(n) for n in (q, k, v, step.dt))
        zv = low.rows(z) if z else None
        params = SteppedAttention(
            T=vv.rows, H=heads, K=key_width, V=width, Hq=q_heads, Hk=k_heads, ldq=qv.ld, ldk=kv.ld, ldv=vv.ld,
            decay="head", scale=float(node.attrs.get("scale", 0.0)) or key_width**-0.5,
            tile=token_tile(low.target.gemm_tile), softplus=bool(step.bias), dt_min=step.least, dt_max=step.most,
            skip=bool(D), gate=bool(z), lddt=dv.ld, ldz=zv.ld if zv else 0,
        )  # fmt: skip
        weights = [low.weight(n, "plain") if n else None for n in (step.bias, A, D)]
        reads = [x for x in (qv, kv, vv, dv, *weights, zv) if x is not None]
        args = [*(Arg(x, "r") for x in reads), Arg(low.state(past, present), "rw"), Arg(low.result(o), "w")]
        low.call(KernelRef("linear_attention", params), *args)

    return Claim(nodes, tuple(n for n in (q, k, v, past, step.dt, z) if n), emit)


def by_head(graph: Graph, name: str, heads: int, width: int) -> tuple[str, str] | None:
    """(s, x) where `name` [1,T,H*V] is s [...,H], one number per head, times x [1,T,H*V]."""
    product = _through(graph, name)
    if product is None or product.op != "Mul":
        return None
    for s, x in (product.inputs, product.inputs[::-1]):
        spread, split = graph.producer.get(s), graph.producer.get(x)
        if spread is None or split is None or spread.op not in VIEWS or split.op not in VIEWS:
            continue
        if graph.shape(s)[-2:] != (heads, 1) or graph.shape(x)[-2:] != (heads, width):
            continue
        if graph.shape(split.inputs[0]) == graph.shape(name) and graph.shape(spread.inputs[0])[-1:] == (heads,):
            return spread.inputs[0], split.inputs[0]
    return None


def _through(graph: Graph, name: str) -> Node | None:
    """Who computes `name`, a reshape aside."""
    node = graph.producer.get(name)
    return graph.producer.get(node.inputs[0]) if node is not None and node.op == "Reshape" else node


def _other(node: Node, name: str) -> str:
    return node.inputs[1] if node.inputs[0] == name else node.inputs[0]


def _vector(graph: Graph, name: str, size: int) -> bool:
    """A float32 weight of `size` elements."""
    weight = graph.weights.get(name)
    return weight is not None and weight.dtype == "float32" and weight.shape == (size,)


def _product_with_weight(graph: Graph, name: str, factor: str, size: int) -> str:
    node = graph.producer.get(name)
    if node is None or node.op != "Mul" or factor not in node.inputs:
        return ""
    weight = _other(node, factor)
    return weight if _vector(graph, weight, size) else ""


def _gate(graph: Graph, name: str) -> tuple[str, tuple[Node, ...]] | None:
    """z and the nodes of name * (z * sigmoid(z)), when nobody else reads `name` or what they make."""
    product = graph.sole_consumer(name)
    gate = graph.producer.get(_other(product, name)) if product is not None and product.op == "Mul" else None
    for sigmoid in (graph.producer.get(i) for i in (gate.inputs if gate is not None else ())):
        found = gated(graph, sigmoid) if sigmoid is not None and sigmoid.op == "Sigmoid" else None
        if found and found[1] == name and found[0] not in graph.weights:
            return found[0], found[2]
    return None


def _step_size(graph: Graph, dt: str, heads: int) -> _Step:
    """Where(x > 20, x, log(1 + e^x)) of x = dt + bias, then Clip: as torch's softplus and clamp are exported."""
    least, most, name = 0.0, math.inf, dt
    clip = graph.producer.get(name)
    if clip is not None and clip.op == "Clip":
        bounds = [_number(graph, i) if i else None for i in (*clip.inputs[1:], "", "")[:2]]
        least, most = 0.0 if bounds[0] is None else bounds[0], math.inf if bounds[1] is None else bounds[1]
        name = clip.inputs[0]
    where = graph.producer.get(name)
    add = graph.producer.get(where.inputs[1]) if where is not None and where.op == "Where" else None
    if where is None or add is None or add.op != "Add" or not _is_softplus(graph, where) or math.isnan(least + most):
        return _Step(dt)
    bias = next((i for i in add.inputs if _vector(graph, i, heads)), "")
    return _Step(_other(add, bias), bias, least, most) if bias else _Step(dt)


def _is_softplus(graph: Graph, where: Node) -> bool:
    x = where.inputs[1]
    greater, soft = graph.producer.get(where.inputs[0]), graph.producer.get(where.inputs[2])
    while soft is not None and soft.op == "Div" and _number(graph, soft.inputs[1]) == 1.0:
        soft = graph.producer.get(soft.inputs[0])
    if greater is None or greater.op != "Greater" or soft is None or soft.op != "Softplus":
        return False
    same = [_unscaled(graph, i) for i in (greater.inputs[0], soft.inputs[0])]
    return same == [x, x] and _number(graph, greater.inputs[1]) == 20.0


def _unscaled(graph: Graph, name: str) -> str:
    node = graph.producer.get(name)
    if node is not None and node.op == "Mul" and _number(graph, node.inputs[1]) == 1.0:
        return node.inputs[0]
    return name


def _number(graph: Graph, name: str) -> float:
    """The scalar weight `name`, also through CastLike; NaN for anything else."""
    node = graph.producer.get(name)
    if node is not None and node.op == "CastLike":
        name = node.inputs[0]
    value = graph.constant(name)
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else math.nan


RULE = Rule(("LinearAttention", "com.microsoft.LinearAttention"), _match)
