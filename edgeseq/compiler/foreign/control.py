"""If, Scan and Loop: the branch taken, or the body once per step.

What decides must be constant: a condition, a trip count, the length of a scanned axis. An If whose condition is
computed keeps both branches and picks the result, which is right because ONNX operators have no side effects.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseq.errors import CompileError

from .build import Build, constant_of
from .shapes import static_shape

MAX_STEPS = 1024
MAX_UNROLLED_NODES = 20_000


def inline_control_flow(graph: ir.Graph, label: str) -> bool:
    """Inline every If, Scan and Loop of `graph` itself (not yet those inside their bodies); whether there was one."""
    found = [node for node in graph if node.domain in ("", "ai.onnx") and node.op_type in _INLINERS]
    for node in found:
        build = Build(node)
        results = _INLINERS[node.op_type](node, build, label)
        build.replace(results)
    return bool(found)


def _body(node: ir.Node, name: str) -> ir.Graph:
    return node.attributes[name].as_graph()


def _splice(build: Build, body: ir.Graph, arguments: list[ir.Value]) -> list[ir.Value]:
    """A copy of `body` with its inputs bound; returns its outputs."""
    copy = body.clone(allow_outer_scope_values=True)
    for formal, actual in zip(copy.inputs, arguments, strict=True):
        formal.replace_all_uses_with(actual, replace_graph_outputs=True)
    outputs, nodes = list(copy.outputs), list(copy)
    copy.outputs.clear()
    for value in list(copy.initializers.values()):
        build.adopt_initializer(copy, value)
    copy.remove(nodes)
    build.take(nodes)
    return outputs


def _if(node: ir.Node, build: Build, label: str) -> list[ir.Value]:
    condition = constant_of(node.inputs[0])
    if condition is not None:
        return _splice(build, _body(node, "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"), [])
    taken, other = (_splice(build, _body(node, name), []) for name in ("then_branch", "else_branch"))
    assert node.inputs[0] is not None
    return [build.op("Where", node.inputs[0], a, b) for a, b in zip(taken, other, strict=True)]


def _scan(node: ir.Node, build: Build, label: str) -> list[ir.Value]:
    """state, slices of the scanned inputs -> body -> state, rows of the scanned outputs."""
    body = _body(node, "body")
    n_scanned = node.attributes["num_scan_inputs"].as_int()
    inputs = [v for v in node.inputs if v is not None]
    n_state = len(inputs) - n_scanned
    n_out = len(body.outputs) - n_state
    state, scanned = inputs[:n_state], inputs[n_state:]
    axes = _ints(node, "scan_input_axes", n_scanned)
    backwards = _ints(node, "scan_input_directions", n_scanned)
    lengths = []
    for value, axis in zip(scanned, axes):
        shape = static_shape(value)
        if shape is None:
            raise CompileError(
                f"{label}: a Scan runs over {value.name}, whose shape is not static", "give more --shape"
            )
        lengths.append(shape[axis])
    if len(set(lengths)) != 1:
        raise CompileError(f"{label}: a Scan runs over axes of the lengths {', '.join(map(str, lengths))}")
    steps = _bounded(lengths[0], body, build, label)
    rows: list[list[ir.Value]] = [[] for _ in range(n_out)]
    for t in range(steps):
        slices = [
            build.op("Gather", v, build.const(steps - 1 - t if back else t), axis=a)
            for v, a, back in zip(scanned, axes, backwards)
        ]  # fmt: skip
        made = _splice(build, body, [*state, *slices])
        state = made[:n_state]
        for row, value in zip(rows, made[n_state:]):
            row.append(value)
    out_axes = _ints(node, "scan_output_axes", n_out)
    out_back = _ints(node, "scan_output_directions", n_out)
    stacked = [_stack(build, r[::-1] if back else r, axis) for r, axis, back in zip(rows, out_axes, out_back)]
    return [*state, *stacked]


def _loop(node: ir.Node, build: Build, label: str) -> list[ir.Value]:
    """A for loop: constant trip count, condition never false."""
    body = _body(node, "body")
    trips, first = (constant_of(v) if v is not None else None for v in node.inputs[:2])
    if node.inputs[0] is None or trips is None:
        raise CompileError(f"{label}: a Loop has a trip count that is computed, so it cannot be unrolled")
    if node.inputs[1] is not None and (first is None or not bool(first.reshape(-1)[0])):
        raise CompileError(f"{label}: a Loop has a condition that is computed, so it cannot be unrolled")
    goes_on, origin = body.outputs[0], body.inputs[1]
    producer = goes_on.producer()
    while producer is not None and producer.op_type == "Identity" and producer.inputs[0] is not None:
        goes_on = producer.inputs[0]
        producer = goes_on.producer()
    known = constant_of(goes_on)
    if goes_on is not origin and (known is None or not bool(known.reshape(-1)[0])):
        raise CompileError(f"{label}: a Loop may stop early, so it cannot be unrolled")
    n_state = len(node.inputs) - 2
    state = [v for v in node.inputs[2:] if v is not None]
    rows: list[list[ir.Value]] = [[] for _ in range(len(body.outputs) - 1 - n_state)]
    condition = build.const(True, np.bool_)
    for t in range(_bounded(int(trips.reshape(-1)[0]), body, build, label)):
        made = _splice(build, body, [build.const(t), condition, *state])
        state = made[1 : 1 + n_state]
        for row, value in zip(rows, made[1 + n_state :]):
            row.append(value)
    if any(not row for row in rows):
        raise CompileError(f"{label}: a Loop that never runs has outputs of unknown shape")
    return [*state, *(_stack(build, row, 0) for row in rows)]


_INLINERS = {"If": _if, "Scan": _scan, "Loop": _loop}


def _ints(node: ir.Node, name: str, n: int) -> list[int]:
    attribute = node.attributes.get(name)
    return list(attribute.as_ints()) if attribute is not None else [0] * n


def _bounded(steps: int, body: ir.Graph, build: Build, label: str) -> int:
    """`steps`, if the whole graph stays small enough to compile; bodies inside the body count too."""
    what, nodes = build.node.op_type, sum(1 for _ in body.all_nodes()) * steps
    if steps > MAX_STEPS or nodes + build.graph.num_nodes() > MAX_UNROLLED_NODES:
        raise CompileError(
            f"{label}: a {what} of {steps} steps and {nodes} nodes is too long to unroll",
            f"give it at most {MAX_STEPS} steps a call, with a smaller --shape or --dim",
        )
    return steps


def _stack(build: Build, rows: list[ir.Value], axis: int) -> ir.Value:
    shape = static_shape(rows[0])
    if axis < 0 and shape is not None:
        axis += len(shape) + 1
    parts = [build.op("Unsqueeze", row, build.const([axis])) for row in rows]
    return parts[0] if len(parts) == 1 else build.op("Concat", *parts, axis=axis)
