"""Declared state becomes `past.<slot>` and `present.<slot>`; a fresh state holds zeros or what the file gives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseq.errors import CompileError, UsageError
from edgeseq.spec import StateSlot

from .shapes import dtype_name, static_shape

STARTED = "started"


def take_defaults(graph: ir.Graph, inputs: list[str]) -> dict[str, np.ndarray]:
    """Initial values that the file gives state inputs as initializers; these inputs then have none any more."""
    defaults = {}
    for name in inputs:
        value = graph.initializers.pop(name, None)
        if value is not None and value.const_value is not None:
            defaults[name] = np.asarray(value.const_value.numpy())
            value.const_value = None
    return defaults


def name_state(
    model: ir.Model, pairs: list[tuple[str, str]], defaults: dict[str, np.ndarray], label: str
) -> tuple[tuple[StateSlot, ...], dict[str, tuple[str, str]]]:
    """Rename the tensors of every pair and return the slots, with the file's names by slot.

    Slots keep the input's name. Raises CompileError when input and output differ in shape or type.
    """
    graph = model.graph
    inputs = {str(v.name): v for v in graph.inputs}
    outputs = {str(v.name): v for v in graph.outputs}
    _refuse_undeclared(inputs, outputs, pairs)
    taken = {str(v.name): v for n in graph for v in n.outputs}
    slots, names = [], {}
    varied: dict[str, np.ndarray] = {}
    for before, after in pairs:
        past, present = inputs[before], outputs[after]
        slot = before.removeprefix("past.")
        if slot in names:
            raise UsageError(f"two states would both be named {slot!r}")
        if static_shape(past) != static_shape(present) or past.dtype != present.dtype:
            raise CompileError(
                f"{label}: state {before} is {_what(past)} but comes back as {_what(present)} from {after}",
                "a state keeps its shape from step to step; a cache that grows needs a fixed size",
            )
        init = defaults.get(before, np.zeros(1))
        if not np.all(init == init.reshape(-1)[0]):
            varied[slot] = init
            init = np.zeros(1)
        slots.append(StateSlot(slot, dtype_name(past.dtype), static_shape(past) or (), float(init.reshape(-1)[0])))  # type: ignore[arg-type]
        names[slot] = (before, after)
        for value, name in ((past, f"past.{slot}"), (present, f"present.{slot}")):
            if name in taken and taken[name] is not value:
                taken[name].name = f"{name}.inner"
            value.name = name
    if varied:
        slots.append(_start_with(graph, varied, {s.name for s in slots}))
    return tuple(slots), names


def _what(value: ir.Value) -> str:
    return f"{dtype_name(value.dtype)}{list(static_shape(value) or ())}"


def _refuse_undeclared(inputs: dict, outputs: dict, pairs: list[tuple[str, str]]) -> None:
    for what, names, declared in (
        ("input", inputs, {p[0] for p in pairs}), ("output", outputs, {p[1] for p in pairs}),
    ):  # fmt: skip
        prefix = "past." if what == "input" else "present."
        for name in names:
            if name.startswith(prefix) and name not in declared:
                raise UsageError(
                    f"the {what} {name!r} is named like a state but is not declared as one",
                    "pair it with --state past.NAME:present.NAME",
                )
    for name, _ in pairs:
        if name not in inputs:
            raise UsageError(f"--state and --value both name {name!r}", "a state changes, a value does not")


def _start_with(graph: ir.Graph, varied: dict[str, np.ndarray], used: set[str]) -> StateSlot:
    """A fresh state is one number per slot. Where the file gives more, the first step takes the file's values instead:
    a slot of its own, 0 in a fresh state and 1 ever after, says which step is the first."""
    name = STARTED
    while name in used:
        name += "_"
    started = ir.Value(name=f"past.{name}", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(started)
    one = _initializer(graph, f"{name}.one", np.ones(1, np.float32))
    half = _initializer(graph, f"{name}.half", np.full(1, 0.5, np.float32))
    later = _node("Greater", [started, half], f"{name}.later", ir.DataType.BOOL, (1,))
    # a computed value, not the constant itself: it leaves the graph as state
    always = _node("Max", [started, one], f"present.{name}", ir.DataType.FLOAT, (1,))
    made = [later, always]
    past_values = {str(v.name): v for v in graph.inputs}
    for slot, init in varied.items():
        past = past_values[f"past.{slot}"]
        shape = static_shape(past) or ()
        first = _initializer(graph, f"{name}.{slot}", init.reshape(shape))
        assert past.dtype is not None
        chosen = _node("Where", [later.outputs[0], past, first], f"{name}.{slot}.now", past.dtype, shape)
        past.replace_all_uses_with(chosen.outputs[0], replace_graph_outputs=True)
        chosen.replace_input_with(1, past)
        made.append(chosen)
    first_node = next(iter(graph), None)
    if first_node is None:
        graph.extend(made)
    else:
        graph.insert_before(first_node, made)
    graph.outputs.append(always.outputs[0])
    return StateSlot(name, "float32", (1,))


def _node(kind: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Node:
    node = ir.Node("", kind, inputs)
    out = node.outputs[0]
    out.name, out.type, out.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return node


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.register_initializer(value)
    return value
