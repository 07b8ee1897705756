"""An ONNX file from anybody: read without its weights, every claim about size and place checked first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto

from edgeseq.errors import CompileError, UsageError

MAX_FILE_BYTES = (1 << 31) - 1  # protobuf holds no more
MAX_ELEMENTS = 1 << 40
MAX_NODES = 200_000
_BLOCK = 1 << 20


def read_model(path: Path) -> ModelProto:
    """The checked model, its external data still outside. UsageError if there is no file, CompileError if it is bad."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise CompileError(f"{path.name} is larger than an ONNX file can be", "keep its weights as external data")
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf raises its own zoo of errors on damaged files
        raise CompileError(f"{path.name} is not a readable ONNX file: {first_line(error)}") from None
    if not model.graph.node or not model.graph.output:
        raise CompileError(f"{path.name} is not a readable ONNX file: it has no graph")
    if sum(1 for _ in _nodes(model)) > MAX_NODES:
        raise CompileError(f"{path.name} has more than {MAX_NODES} nodes")
    for tensor in tensors(model):
        _check_tensor(tensor, path)
    with _leniently(model.graph):
        try:
            onnx.checker.check_model(str(path) if any(map(_is_external, tensors(model))) else model)
        except Exception as error:
            raise CompileError(f"{path.name} is not valid ONNX: {first_line(error)}") from None
    return model


@contextmanager
def _leniently(graph: GraphProto) -> Iterator[None]:
    """What the checker minds and nobody else does, hidden from it: outputs without a shape, data in other files (whose
    place is checked here, and which it would look for in the working directory)."""
    bare = [v for v in graph.output if v.type.HasField("tensor_type") and not v.type.tensor_type.HasField("shape")]
    outside = [t for t in graph.initializer if _is_external(t)]
    inside = [t for t in graph.initializer if not _is_external(t)]
    declared = [v.name for v in graph.input]
    for value in bare:
        value.type.tensor_type.shape.SetInParent()
    if outside:
        del graph.initializer[:]
        graph.initializer.extend(inside)
    for tensor in outside:
        if tensor.name not in declared:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        yield
    finally:
        for value in bare:
            value.type.tensor_type.ClearField("shape")
        if outside:
            del graph.input[len(declared) :]
            graph.initializer.extend(outside)


def digest(path: Path, model: ModelProto) -> hashlib._Hash:
    """SHA-256 of the file and of the data files it points to."""
    files = dict.fromkeys([path, *(_location(t, path) for t in tensors(model) if _is_external(t))])
    made = hashlib.sha256()
    for file in files:
        with open(file, "rb") as data:
            while block := data.read(_BLOCK):
                made.update(block)
    return made


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Initializers and constants of the graph, its subgraphs and functions."""
    for graph in _graphs(model.graph):
        yield from graph.initializer
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _nodes(model: ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        for node in function.node:
            yield node
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    for graph in _graphs(attribute.g):
                        yield from graph.node


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _location(tensor: TensorProto, path: Path) -> Path:
    """The data file of an external tensor; it must lie beside the model or below."""
    folder = path.parent.resolve()
    entries = {e.key: e.value for e in tensor.external_data}
    file = (folder / entries.get("location", "")).resolve()
    if not file.is_relative_to(folder) or not file.is_file():
        raise CompileError(
            f"{path.name}: the data of {tensor.name} points to '{entries.get('location', '')}'",
            "external data must be a file in the model's own folder",
        )
    return file


def _check_tensor(tensor: TensorProto, path: Path) -> None:
    if any(d < 0 for d in tensor.dims) or math.prod(tensor.dims) > MAX_ELEMENTS:
        raise CompileError(f"{path.name}: {tensor.name} has the shape {list(tensor.dims)}, which no tensor has")
    if not _is_external(tensor):
        return
    file = _location(tensor, path)
    entries = {e.key: e.value for e in tensor.external_data}
    try:
        offset, bits = int(entries.get("offset") or 0), _bits(tensor.data_type)
        length = int(entries.get("length") or math.prod(tensor.dims) * bits // 8)
    except (ValueError, KeyError, TypeError):
        raise CompileError(f"{path.name}: the place of {tensor.name} in {file.name} is not readable") from None
    needed = math.prod(tensor.dims) * bits // 8
    if offset < 0 or length < needed or offset + length > file.stat().st_size:
        raise CompileError(
            f"{path.name}: {tensor.name} needs {needed} bytes at {offset} of {file.name}, which ends before"
        )


def _bits(data_type: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8
