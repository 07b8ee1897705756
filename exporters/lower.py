"""From a tidy graph to the ONNX file: stored weight types, external data, inferred shapes, final check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from edgeseq.errors import ExportError
from edgeseq.spec import DType
from exporters.quantise import is_expert_matrix
from exporters.tidy import weights
from exporters.weights import FILE, Layout

ONNX_DTYPE = {
    "float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64, "int32": ir.DataType.INT32, "int8": ir.DataType.INT8, "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
}  # fmt: skip
SPEC_DTYPE: dict[ir.DataType, DType] = {onnx_dtype: name for name, onnx_dtype in ONNX_DTYPE.items()}  # type: ignore[misc]
INLINE_LIMIT = 1 << 10  # bytes of a constant that stays inside the graph


def matrices(graph: ir.Graph) -> set[str]:
    """Weights that only feed matrix products and row lookups: the ones that may be stored in half precision."""
    return {value.name or "" for value in weights(graph) if value.uses() and all(map(_is_matrix_use, value.uses()))}


def _is_matrix_use(use: ir.Usage) -> bool:
    if is_expert_matrix(use):
        return True
    if use.node.op_type == "Transpose":
        return all(u.node.op_type == "MatMul" and u.idx == 1 for u in use.node.outputs[0].uses())
    return use.node.op_type == "Gather" and use.idx == 0


def store_as(graph: ir.Graph, names: set[str], dtype: DType) -> None:
    """Store these weights as `dtype` and cast them to float32 where they are read (a lookup casts its rows only)."""
    for value in weights(graph):
        if value.name not in names:
            continue
        casts: dict[bool, ir.Node] = {}
        for use in list(value.uses()):
            row = use.node.op_type == "Gather"
            source = use.node.outputs[0] if row else value
            readers = list(source.uses()) if row else [use]
            cast = casts.get(row) if not row else None
            if cast is None:
                cast = ir.node("Cast", [source], {"to": ir.DataType.FLOAT.value})
                cast.name = cast.outputs[0].name = f"{source.name}.float32"
                cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
                cast.outputs[0].shape = source.shape
                graph.insert_after(use.node, cast) if row else graph.insert_before(use.node, cast)
                casts[row] = cast
            for reader in readers:
                reader.node.replace_input_with(reader.idx, cast.outputs[0])
            if row:
                source.type = ir.TensorType(ONNX_DTYPE[dtype])
        value.type = ir.TensorType(ONNX_DTYPE[dtype])


def stored_types(graph: ir.Graph) -> dict[str, tuple[DType, tuple[int, ...]]]:
    """Type and shape of every weight as the graph reads it."""
    found = {}
    for value in weights(graph):
        assert value.name is not None and value.dtype is not None and value.shape is not None
        found[value.name] = (SPEC_DTYPE[value.dtype], tuple(int(size) for size in value.shape))
    return found


def large_constants(graph: ir.Graph) -> dict[str, ir.Value]:
    """Constants of the model's code that are too large to stay inside the graph."""
    return {
        value.name: value
        for value in graph.initializers.values()
        if value.name and value.const_value is not None and value.const_value.nbytes > INLINE_LIMIT
    }


def point_to_file(graph: ir.Graph, layout: Layout, same_bytes: Mapping[str, str]) -> None:
    """Every weight becomes external data: a byte range of the shared weights file.

    same_bytes: weights that are another shape of a stored tensor, by name -> the stored tensor's name.
    """
    for value in weights(graph):
        name = value.name or ""
        stored = layout.tensors[same_bytes.get(name, name)]
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            FILE,
            stored.offset,
            stored.nbytes,
            ONNX_DTYPE[stored.dtype],
            shape=value.shape if name in same_bytes else ir.Shape(stored.shape),
            name=name,
        )


def save(model: ir.Model, path: Path) -> None:
    """Write the file with inferred shapes for every value, then check it the way a stranger would."""
    proto = ir.to_proto(model)
    try:
        proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"shapes of {path.name} cannot be inferred: {str(error).splitlines()[0]}") from error
    unknown = _values_without_shape(proto)
    if unknown:
        raise ExportError(
            f"{path.name} has values of unknown shape, the first is {unknown[0]}", "all sizes must be static"
        )
    path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)


def _values_without_shape(proto: onnx.ModelProto) -> list[str]:
    known: Mapping[str, bool] = {
        value.name: all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
        and value.type.tensor_type.HasField("shape")
        for value in (*proto.graph.value_info, *proto.graph.output)
    }
    return [name for node in proto.graph.node for name in node.output if name and not known.get(name)]


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
