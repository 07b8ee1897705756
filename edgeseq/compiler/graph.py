"""An ONNX graph as the compiler reads it: nodes in order, static shapes, weights that stay in their file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from edgeseq.errors import CompileError

DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT64: "int64", TensorProto.INT32: "int32", TensorProto.INT8: "int8", TensorProto.UINT8: "uint8",
    TensorProto.BOOL: "bool",
}  # fmt: skip


@dataclass(eq=False)
class Node:
    """One ONNX node. `op` is the operator's name, prefixed by its domain unless that is the standard one."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any]
    proto: onnx.NodeProto
    index: int


@dataclass(frozen=True)
class Weight:
    """An initializer: bytes at `offset` of `file`, or small data held by the graph itself in `array`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | None
    offset: int
    array: np.ndarray | None

    def load(self) -> np.ndarray:
        """The values, C-contiguous; bfloat16 as uint16. External data is mapped, not read."""
        if self.array is not None:
            return self.array
        assert self.file is not None
        storage = {"bfloat16": "uint16"}.get(self.dtype, self.dtype)
        try:
            return np.memmap(self.file, dtype=storage, mode="r", offset=self.offset, shape=self.shape or (1,))
        except (OSError, ValueError) as error:
            raise CompileError(f"{self.name}: its data in {self.file} cannot be read: {error}") from error


class Graph:
    """The parts of `model` by name. Raises CompileError where a shape is not static."""

    def __init__(self, model: onnx.ModelProto, folder: Path, label: str) -> None:
        self.model, self.folder, self.label = model, folder, label
        self.weights = {t.name: self._weight(t) for t in model.graph.initializer}
        self.nodes = [self._node(p, i) for i, p in enumerate(model.graph.node) if p.op_type != "Constant"]
        for p in model.graph.node:
            if p.op_type == "Constant":
                self.weights[p.output[0]] = self._constant(p)
        self.inputs = [v.name for v in model.graph.input if v.name not in self.weights]
        self.outputs = [v.name for v in model.graph.output]
        self.types = self._types()
        self.producer = {o: n for n in self.nodes for o in n.outputs if o}
        self.consumers: dict[str, list[Node]] = {}
        for n in self.nodes:
            for name in dict.fromkeys(n.inputs):
                if name:
                    self.consumers.setdefault(name, []).append(n)

    def dtype(self, name: str) -> str:
        return self.types[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.types[name][1]

    def constant(self, name: str) -> np.ndarray | None:
        """The values of a small constant, or None when `name` is computed or large."""
        weight = self.weights.get(name)
        if weight is None or int(np.prod(weight.shape)) > 4096:
            return None
        return np.asarray(weight.load()).reshape(weight.shape)

    def sole_consumer(self, name: str) -> Node | None:
        """The only reader of `name`, unless the graph also returns it."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def _node(self, p: onnx.NodeProto, index: int) -> Node:
        domain = "" if p.domain in ("", "ai.onnx") else f"{p.domain}."
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in p.attribute}
        attrs = {k: v.decode() if isinstance(v, bytes) else v for k, v in attrs.items()}
        return Node(domain + p.op_type, tuple(p.input), tuple(p.output), attrs, p, index)

    def _weight(self, t: TensorProto) -> Weight:
        dtype, shape = self._dtype(t.data_type, t.name), tuple(t.dims)
        if t.data_location != TensorProto.EXTERNAL:
            return Weight(t.name, dtype, shape, None, 0, np.ascontiguousarray(numpy_helper.to_array(t)))
        entries = {e.key: e.value for e in t.external_data}
        path = (self.folder / entries.get("location", "")).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            raise CompileError(f"{self.label}: the data of {t.name} points to '{entries.get('location')}'",
                               "external data must be a file inside the export directory")  # fmt: skip
        offset = int(entries.get("offset", "0"))
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype({"bfloat16": "uint16"}.get(dtype, dtype)).itemsize
        if offset < 0 or offset + nbytes > path.stat().st_size:
            raise CompileError(
                f"{self.label}: {t.name} needs {nbytes} bytes at {offset} of {path.name}, which ends before"
            )
        return Weight(t.name, dtype, shape, path, offset, None)

    def _constant(self, p: onnx.NodeProto) -> Weight:
        value = next((a for a in p.attribute if a.name == "value"), None)
        if value is None:
            raw = {a.name: onnx.helper.get_attribute_value(a) for a in p.attribute}
            key, data = next(iter(raw.items()))
            array = np.asarray(data, dtype="float32" if "float" in key else "int64")
        else:
            array = np.asarray(numpy_helper.to_array(value.t))
        return Weight(p.output[0], str(array.dtype), array.shape, None, 0, np.ascontiguousarray(array))

    def _dtype(self, code: int, name: str) -> str:
        if code not in DTYPES:
            raise CompileError(
                f"{self.label}: {name} has type {TensorProto.DataType.Name(code)}, which is not supported"
            )
        return DTYPES[code]

    def _types(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        types = {n: (w.dtype, w.shape) for n, w in self.weights.items()}
        graph = self.model.graph
        for v in (*graph.input, *graph.output, *graph.value_info):
            dims = v.type.tensor_type.shape.dim
            if any(not d.HasField("dim_value") for d in dims):
                if v.name in self.outputs or v in graph.input:
                    raise CompileError(f"{self.label}: {v.name} has a dynamic shape", "export with static shapes")
                continue
            types[v.name] = (self._dtype(v.type.tensor_type.elem_type, v.name), tuple(d.dim_value for d in dims))
        missing = next(((n, o) for n in self.nodes for o in n.outputs if o and o not in types), None)
        if missing:
            node, name = missing
            raise CompileError(
                f"{self.label}: the shape of {name}, which operator {node.op} makes, is unknown",
                "export with static shapes and with operators that onnx knows",
            )
        return types


def load_graph(path: Path) -> Graph:
    """Read `path` without its weights and infer every shape."""
    from edgeseq.ops import register_all

    register_all()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own zoo of errors on damaged files
        raise CompileError(f"{path.name} is not a readable ONNX file: {error}") from error
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompileError(f"{path.name}: its shapes do not fit together: {reason}") from error
    return Graph(model, path.parent, path.name)
