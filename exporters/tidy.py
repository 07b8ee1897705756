"""From torch's graph to ours: inputs and outputs by role, constants folded, noise gone, names a reader can follow.

Weights are initializers without a value throughout; nothing here reads or folds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from edgeseq.errors import ExportError
from edgeseq.ops import DOMAIN, ONNX_OPSET, VERSION, all_ops
from edgeseq.spec import StepSignature
from exporters import contrib

IR_VERSION = 10  # the first with function overloads
FOLD_LIMIT = 1 << 16  # elements of a folded constant


def tidy(model: ir.Model, signature: StepSignature) -> None:
    """All of it, in place. Afterwards `weights(model.graph)` are exactly the initializers without a value."""
    model.opset_imports[""] = ONNX_OPSET
    optimizer.fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=FOLD_LIMIT,
        output_size_limit=FOLD_LIMIT,
        should_fold=lambda node: False if any(map(_is_weight, node.inputs)) else None,
    )
    common.RemoveUnusedNodesPass()(model)
    _drop_identities(model.graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_constants(model.graph)
    for clean in (
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    ):
        clean(model)
    _name_interface(model.graph, signature)
    _drop_unused_position(model.graph, signature)
    _name_values(model.graph)
    attach_functions(model)
    _forget_metadata(model)
    model.graph.name = f"advance{signature.tokens}"
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "edgeseq", str(VERSION)
    domains = {node.domain for node in model.graph}
    model.opset_imports.clear()
    model.opset_imports.update({"": ONNX_OPSET, DOMAIN: VERSION, contrib.DOMAIN: 1})
    for domain in (DOMAIN, contrib.DOMAIN):
        if domain not in domains:
            del model.opset_imports[domain]


def weights(graph: ir.Graph) -> list[ir.Value]:
    """The initializers that are weights, in the graph's order."""
    return [value for value in graph.initializers.values() if _is_weight(value)]


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is None


def _name_interface(graph: ir.Graph, signature: StepSignature) -> None:
    states = [slot.name for slot in signature.state]
    given = [spec.name for spec in signature.inputs]
    past, present = [f"past.{s}" for s in states], [f"present.{s}" for s in states]
    if len(graph.inputs) > len(given) + len(past):
        given.append("position")  # advance takes it, this model does not read it
    for value, name in zip(graph.inputs, given + past, strict=True):
        value.name = name
    results = [spec.name for spec in signature.outputs] + present
    for index, (value, name) in enumerate(zip(list(graph.outputs), results, strict=True)):
        if value.is_graph_input() or value.is_initializer() or list(graph.outputs).index(value) != index:
            copy = ir.node("Identity", [value])  # an output that is also something else gets a value of its own
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            value = graph.outputs[index] = copy.outputs[0]
        value.name = name


def _drop_identities(graph: ir.Graph) -> None:
    """An Identity stays only where an output is also an input, a weight or another output."""
    for node in [n for n in graph if n.op_type == "Identity" and not n.domain]:
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        if result.is_graph_output():
            if source.producer() is None or source.is_graph_output():
                continue
            graph.outputs[list(graph.outputs).index(result)] = source
        result.replace_all_uses_with(source)
        graph.remove(node, safe=True)


def _merge_constants(graph: ir.Graph) -> None:
    """Equal constants become one."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in [v for v in graph.initializers.values() if not _is_weight(v)]:
        assert value.const_value is not None and value.name is not None
        array = value.const_value.numpy()
        same = first.setdefault((str(array.dtype), array.shape, array.tobytes()), value)
        if same is not value:
            value.replace_all_uses_with(same)
            del graph.initializers[value.name]


def _drop_unused_position(graph: ir.Graph, signature: StepSignature) -> None:
    declared = {spec.name for spec in signature.inputs}
    for value in [v for v in graph.inputs if v.name == "position" and v.name not in declared]:
        if value.uses():
            raise ExportError(
                "the model says that it does not use the position, but its graph reads it", "set uses_position = True"
            )
        graph.inputs.remove(value)


def _name_values(graph: ir.Graph) -> None:
    """A value is called after the weight its node reads, else after the layer around it and the operator.

    layers.3.in_proj.weight -> Transpose -> layers.3.in_proj.transpose -> MatMul -> layers.3.in_proj.matmul
    """
    kept = {value.name for value in chain(graph.inputs, graph.outputs, weights(graph))}
    _name_constants(graph, kept)
    used = set(kept) | set(graph.initializers)
    layer = ""
    module: dict[ir.Value, str] = {}
    for node in graph:
        stems = {stem: None for v in node.inputs if v is not None and (stem := _module_of(v, module))}
        stem = next(iter(stems)) if len(stems) == 1 else ""
        if stems:
            layer = _layer_of(next(iter(stems)))
            if stem and all(_module_of(v, module) or v.is_initializer() for v in node.inputs if v is not None):
                module.update(dict.fromkeys(node.outputs, stem))  # a reshaped weight still speaks for its module
        while node.outputs[-1].name == "":  # an optional output that nobody reads
            node.resize_outputs(len(node.outputs) - 1)
        base = ".".join(part for part in (stem or layer, node.op_type.lower()) if part)
        for index, output in enumerate(node.outputs):
            if output.name not in kept:
                output.name = _unused(base if len(node.outputs) == 1 else f"{base}.{index}", used)
            used.add(output.name)
        node.name = node.outputs[0].name if node.outputs[0].name not in kept else _unused(base, used)


def _module_of(value: ir.Value, module: dict[ir.Value, str]) -> str:
    if value in module:
        return module[value]
    return re.sub(r"\.weight$", "", value.name or "") if _is_weight(value) else ""


def _layer_of(stem: str) -> str:
    """layers.3.in_proj -> layers.3; norm -> nothing."""
    found = re.match(r"(.*\.\d+)(\.|$)", stem)
    return found.group(1) if found else ""


def _unused(name: str, used: set[str | None]) -> str:
    candidate, count = name, 2
    while candidate in used:
        candidate, count = f"{name}_{count}", count + 1
    used.add(candidate)
    return candidate


def _name_constants(graph: ir.Graph, kept: set[str | None]) -> None:
    """Small constants are called by type and value: int64_0_256."""
    constants = [value for value in graph.initializers.values() if not _is_weight(value)]
    used = set(kept)
    for value in constants:
        assert value.name is not None and value.const_value is not None
        del graph.initializers[value.name]
    for value in constants:
        value.name = _unused(_constant_name(value.const_value.numpy()), used)
        value.const_value.name = value.name
        graph.initializers[value.name] = value


def _constant_name(array: np.ndarray) -> str:
    if array.size > 4 or array.dtype.kind not in "iufb":
        return "constant." + "x".join(map(str, array.shape))
    rank = "" if array.ndim else "scalar_"
    return f"{array.dtype}_{rank}" + "_".join(str(item) for item in array.reshape(-1).tolist())


def _forget_metadata(model: ir.Model) -> None:
    """torch notes its own node names and stack traces, with this machine's paths, on values too."""
    graph = model.graph
    values = chain(graph.inputs, graph.initializers.values(), *(node.outputs for node in graph))
    for thing in chain((model, graph), graph, values):
        thing.metadata_props.clear()
        thing.doc_string = None


def attach_functions(model: ir.Model) -> None:
    """Every node of the domain gets the function that serves its signature; each is written once, others go."""
    model.functions.clear()
    for node in _domain_nodes(model.graph):
        op = all_ops()[node.op_type]
        function = ir.from_proto(op.function_for(ir.to_proto(node)))
        node.overload = function.overload
        model.functions.setdefault(function.identifier(), function)


def _domain_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph.all_nodes() if node.domain == DOMAIN)
