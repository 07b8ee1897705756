"""Small tools to replace one node of an ONNX graph by several."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The values of a constant, or None when `value` is computed, an input, or absent."""
    if value is None or value.is_graph_input():
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and producer.domain in ("", "ai.onnx"):
        attribute = next(iter(producer.attributes.values()))
        if attribute.type == ir.AttributeType.TENSOR:
            return np.asarray(attribute.as_tensor().numpy())
        return np.asarray(attribute.value, np.float32 if "FLOAT" in attribute.type.name else np.int64)
    return None if value.const_value is None else np.asarray(value.const_value.numpy())


class Build:
    """Collects nodes that take the place of `node`."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        assert isinstance(node.graph, ir.Graph)
        self.graph: ir.Graph = node.graph
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
        self._made = 0

    def name(self) -> str:
        """A name that no initializer has; NameFixPass settles what may still clash between nodes."""
        base = self.node.outputs[0].name or self.node.op_type
        while True:
            self._made += 1
            name = f"{base}.{self._made}"
            if name not in self.graph.initializers:
                return name

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node of one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, n: int, *inputs: ir.Value | None, **attributes: Any) -> list[ir.Value]:
        """Append a node of `n` outputs."""
        made = ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes), num_outputs=n)
        for value in made.outputs:
            value.name = self.name()
        self.nodes.append(made)
        return list(made.outputs)

    def const(self, data: Any, dtype: Any = np.int64) -> ir.Value:
        """An initializer; equal ones are made once."""
        array = np.ascontiguousarray(np.asarray(data, dtype))
        array = array.reshape(np.shape(data))
        key = (str(array.dtype), array.tobytes(), array.shape)
        if array.size > 64 or key not in self._constants:
            tensor = ir.tensor(array, name=self.name())
            value = ir.Value(
                name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
            )
            self.graph.register_initializer(value)
            if array.size > 64:
                return value
            self._constants[key] = value
        return self._constants[key]

    def take(self, nodes: list[ir.Node]) -> None:
        """Append nodes that belong to no graph any more; their names become unique."""
        for node in nodes:
            for value in node.outputs:
                value.name = self.name()
        self.nodes += nodes

    def adopt_initializer(self, owner: ir.Graph, value: ir.Value) -> None:
        """Move an initializer of a subgraph's copy into this graph."""
        del owner.initializers[str(value.name)]
        value.name = self.name()
        if value.const_value is not None:
            value.const_value.name = value.name
        self.graph.register_initializer(value)

    def replace(self, results: list[ir.Value]) -> None:
        """Put the collected nodes in the place of the node, `results` in the place of its outputs."""
        old = list(self.node.outputs)
        pairs = [(o, r) for o, r in zip(old, results, strict=True)]
        fixed: list[ir.Value] = []
        for o, r in pairs:
            inner = any(r is v for n in self.nodes for v in n.outputs)
            if o.is_graph_output() and (not inner or any(r is f for f in fixed)):
                r = self.op("Identity", r)  # an output needs a value of its own
            fixed.append(r)
        ir.convenience.replace_nodes_and_values(self.graph, self.node, [self.node], self.nodes, old, fixed)
