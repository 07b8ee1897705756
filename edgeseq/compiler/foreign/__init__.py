"""Somebody else's stateful ONNX file -> the form our compiler reads. The stages, in order:

| stage | function | file |
|---|---|---|
| read | read.read_model | read.py: size, places and validity of everything the file claims |
| bind | shapes.bind_shapes, bind_values | shapes.py: static inputs, inputs that are constants |
| simplify | simplify.simplify | simplify.py: folding, inlining, opset |
| – control flow | control.inline_control_flow | control.py: If, Scan, Loop |
| – recurrent layers | decompose.decompose | decompose.py, recurrent.py: LSTM, GRU, RNN |
| name | state.name_state | state.py: `past.` and `present.`, initial values |
| declare | roles.with_roles, _manifest | roles.py, this file: the manifest of one step |
| golden | golden.write_golden | golden.py: what onnxruntime makes of the file as it came |
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgeseq.errors import CompileError, EdgeseqError
from edgeseq.ops import register_all
from edgeseq.spec import GraphFile, Manifest, StepSignature, TensorSpec

from ..rules import rules_by_op
from .golden import write_golden
from .options import ImportOptions, state_pairs
from .read import digest, first_line, read_model
from .roles import check_roles, with_roles
from .shapes import bind_shapes, bind_values, dtype_name, forget_shapes, real_inputs, require_static, static_shape
from .simplify import simplify
from .state import name_state, take_defaults

__all__ = ["ImportOptions", "Imported", "import_onnx", "save", "write_golden"]


@dataclass(frozen=True)
class Imported:
    """A file as the compiler reads it: manifest, graph `step.onnx` (large weights may stay in the file's folder).

    names:     slot name -> (input, output) of the file.
    defaults:  initial values that the file itself gives, by input.
    constants: inputs that became constants, with their values.
    """

    manifest: Manifest
    model: onnx.ModelProto
    folder: Path
    names: dict[str, tuple[str, str]]
    defaults: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]


def import_onnx(path: Path, options: ImportOptions) -> Imported:
    """Read `path` as one step of a stream. Nothing is written.

    Raises UsageError for options that do not fit the file, CompileError for a file that cannot become a step.
    """
    register_all()
    proto = read_model(path)
    try:
        return _imported(path, proto, options)
    except EdgeseqError:
        raise
    except Exception as error:  # what the libraries raise on a file that is valid and still makes no sense
        raise CompileError(f"{path.name} cannot be read as a step: {first_line(error.__cause__ or error)}") from error


def _imported(path: Path, proto: onnx.ModelProto, options: ImportOptions) -> Imported:
    digests = digest(path, proto)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    opset = model.opset_imports.get("", 0)
    inputs, outputs = ([str(v.name) for v in values] for values in (model.graph.inputs, model.graph.outputs))
    pairs = state_pairs(options.states, inputs, outputs)
    check_roles(options.roles, inputs, outputs)
    bind_shapes(model.graph, options)
    defaults = take_defaults(model.graph, [i for i, _ in pairs])
    constants = bind_values(model.graph, options)
    forget_shapes(model.graph, dict(options.dims))
    simplify(
        model, path.name, lambda domain, op: (op if domain in ("", "ai.onnx") else f"{domain}.{op}") in rules_by_op()
    )
    require_static(model.graph, path.name)
    slots, names = name_state(model, pairs, defaults, path.name)
    signature = StepSignature(
        1,
        tuple(_spec(v) for v in real_inputs(model.graph) if not str(v.name).startswith("past.")),
        tuple(_spec(v) for v in model.graph.outputs if not str(v.name).startswith("present.")),
        slots,
    )
    signature = with_roles(signature, options.roles)
    digests.update(json.dumps([[asdict(s) for s in slots], sorted(options.values.items())], sort_keys=True).encode())
    config = {
        "opset": opset,
        "state": {slot: list(pair) for slot, pair in names.items()},
        "values": dict(options.values),
        "roles": dict(options.roles),
    }
    manifest = _manifest(path, model, signature, digests.hexdigest()[:32], config)
    return Imported(manifest, ir.to_proto(model), path.parent, names, defaults, constants)


def save(imported: Imported, folder: Path) -> None:
    """Write the graph as the compiler reads it, for people."""
    (folder / "0-imported.onnx").write_bytes(imported.model.SerializeToString())


def _spec(value: ir.Value) -> TensorSpec:
    return TensorSpec(str(value.name), dtype_name(value.dtype), static_shape(value) or ())  # type: ignore[arg-type]


def _manifest(path: Path, model: ir.Model, signature: StepSignature, model_id: str, config: dict) -> Manifest:
    sizes: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.uses() and "float" in dtype_name(value.dtype):
            sizes[dtype_name(value.dtype)] += math.prod(static_shape(value) or ())
    return Manifest(
        family="onnx",
        source=path.name,
        model_id=model_id,
        dtype=sizes.most_common(1)[0][0] if sizes else "float32",
        quant="none",
        flavour="onnx",
        context=0,
        vocab_size=next((s.shape[-1] for s in signature.outputs if s.role == "logits"), 0),
        params=sizes.total(),
        tokenizer="none",
        graphs=(GraphFile("step.onnx", signature),),
        config=config,
    )
