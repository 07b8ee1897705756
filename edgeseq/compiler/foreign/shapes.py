"""Inputs get static shapes, some become constants, and the shapes the file claims for everything else are dropped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgeseq.errors import CompileError, UsageError
from edgeseq.spec import DTYPE_BYTES

from .options import ImportOptions, known_inputs

NUMPY = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
MAX_RANK = 4  # what a bundle stores


def dtype_name(dtype: ir.DataType | None) -> str:
    """`float32` for DataType.FLOAT and so on; the type's own name where we have none."""
    if dtype is None:
        return "unknown"
    return NUMPY.get(dtype.name, dtype.name.lower())


def real_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Inputs a caller must give: those without a default among the initializers."""
    return [v for v in graph.inputs if v.name not in graph.initializers]


def bind_shapes(graph: ir.Graph, options: ImportOptions) -> None:
    """Give every input its static shape. UsageError for an option that fits nothing, or where a dimension is open."""
    by_name = {str(v.name): v for v in graph.inputs}
    symbols = {d.value for v in graph.inputs for d in v.shape or () if isinstance(d, ir.SymbolicDim) and d.value}
    for name in options.shapes:
        if name not in by_name:
            raise UsageError(
                f"--shape names the input {name!r}, which the file does not have", known_inputs([*by_name])
            )
    for name in options.dims:
        if name not in symbols:
            known = f"it has {', '.join(sorted(map(str, symbols)))}" if symbols else "all of its dimensions are static"
            raise UsageError(f"--dim names {name!r}, which is no symbolic dimension of an input", known)
    for name, value in by_name.items():
        value.shape = ir.Shape(_static(name, value, options))


def _static(name: str, value: ir.Value, options: ImportOptions) -> tuple[int, ...]:
    given = options.shapes.get(name)
    declared = tuple(value.shape) if value.shape is not None else None
    if declared is None and given is None:
        raise UsageError(f"the file does not say the rank of input {name!r}", f"give --shape {name}=1,…")
    if declared is None:
        declared = tuple(ir.SymbolicDim(None) for _ in given or ())
    if given is not None and len(given) != len(declared):
        raise UsageError(
            f"--shape gives {name!r} {len(given)} dimensions, the file {_text(declared)}", "give one size per dimension"
        )
    dims = []
    for axis, dim in enumerate(declared):
        size = dim if isinstance(dim, int) else options.dims.get(str(dim.value)) if dim.value else None
        if given is not None:
            if size is not None and size != given[axis]:
                raise UsageError(
                    f"--shape gives axis {axis} of {name!r} the size {given[axis]}, elsewhere it is {size}",
                    "a size that the file fixes cannot change",
                )
            size = given[axis]
        if size is None:
            symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
            hint = f"give --dim {symbol}=1" if symbol else f"give --shape {name}=1,…"
            raise UsageError(f"axis {axis} of input {name!r} has no size: the file says {_text(declared)}", hint)
        if size < 1:
            raise UsageError(f"axis {axis} of input {name!r} has the size {size}", "sizes begin at 1")
        dims.append(int(size))
    return tuple(dims)


def _text(dims: tuple[int | ir.SymbolicDim, ...]) -> str:
    return "[" + ", ".join(str(d) if isinstance(d, int) else str(d.value or "?") for d in dims) + "]"


def bind_values(graph: ir.Graph, options: ImportOptions) -> dict[str, np.ndarray]:
    """Turn the inputs of `options.values` into constants, and inputs with a default (old ONNX lists weights) too.

    Returns the values of the former.
    """
    made = {}
    by_name = {str(v.name): v for v in graph.inputs}
    for name, text in options.values.items():
        if name not in by_name:
            raise UsageError(
                f"--value names the input {name!r}, which the file does not have", known_inputs([*by_name])
            )
        value = by_name[name]
        made[name] = _parse(name, text, value)
        value.const_value = ir.tensor(made[name], name=name)
        graph.initializers[name] = value
    for value in [v for v in graph.inputs if v.name in graph.initializers]:
        graph.inputs.remove(value)
    return made


def _parse(name: str, text: str, value: ir.Value) -> np.ndarray:
    dtype, shape = dtype_name(value.dtype), tuple(int(d) for d in value.shape or ())
    if dtype not in DTYPE_BYTES or dtype == "bfloat16":
        raise UsageError(f"--value cannot set {name!r}, which is {dtype}")
    words = {"true": "1", "false": "0"}
    hint = f"it is {dtype} {list(shape)}: give one number for all, or one each"
    try:
        numbers = [float(words.get(p.strip().lower(), p)) for p in text.split(",")]
    except ValueError:
        raise UsageError(f"--value {name}={text} is not a number or a list of numbers", hint) from None
    array = np.array(numbers, np.float64)
    with np.errstate(invalid="ignore"):
        cast = array.astype(dtype)
    if "float" not in dtype and not np.array_equal(cast.astype(np.float64), array):
        raise UsageError(f"--value {name}={text} does not fit {dtype}", hint)
    size = int(np.prod(shape))
    if cast.size not in (1, size):
        raise UsageError(f"--value gives {name!r} {cast.size} numbers, its shape {list(shape)} holds {size}", hint)
    return np.broadcast_to(cast.reshape(shape if cast.size == size else ()), shape).copy()


def forget_shapes(graph: ir.Graph, dims: dict[str, int]) -> None:
    """Drop what the file says of shapes inside: it was said for other inputs. They are inferred anew.

    Operators outside the standard domain have no inference: theirs stay, with `dims` put in.
    """
    for node in _all_nodes(graph):
        for value in node.outputs:
            if node.domain in ("", "ai.onnx"):
                value.shape = None
            elif value.shape is not None:
                known = [d if isinstance(d, int) else dims.get(str(d.value)) for d in value.shape]
                value.shape = ir.Shape([d if d is not None else None for d in known])


def _all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _all_nodes(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                for inner in attribute.as_graphs():
                    yield from _all_nodes(inner)


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape when every dimension is known."""
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(int(d) for d in value.shape)


def require_static(graph: ir.Graph, label: str) -> None:
    """CompileError naming the first value without a static shape or with a type that no kernel has."""
    for node in graph:
        for value in node.outputs:
            if not value.name or (not value.uses() and not value.is_graph_output()):
                continue
            if static_shape(value) is None:
                raise CompileError(
                    f"{label}: the shape of {value.name} ({node.op_type}) is not static",
                    "give more of --shape, --dim and --value; a shape that depends on computed values cannot compile",
                )
            if dtype_name(value.dtype) not in DTYPE_BYTES:
                raise CompileError(
                    f"{label}: {value.name} ({node.op_type}) is {dtype_name(value.dtype)}, which is not supported"
                )
    for value in (*graph.inputs, *graph.outputs):
        shape = static_shape(value)
        if shape is None:
            raise CompileError(f"{label}: the shape of {value.name} is not static")
        if len(shape) > MAX_RANK:
            raise CompileError(f"{label}: {value.name} has {len(shape)} dimensions, a bundle stores at most {MAX_RANK}")
        if dtype_name(value.dtype) not in DTYPE_BYTES:
            raise CompileError(f"{label}: {value.name} is {dtype_name(value.dtype)}, which is not supported")
