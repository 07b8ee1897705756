"""Stateful ONNX files written the way others write them, and both sides of a comparison as streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeseq.compiler.foreign import Imported, ImportOptions, import_onnx

DTYPES = {np.dtype(n): helper.np_dtype_to_tensor_dtype(np.dtype(n)) for n in ("float32", "int64", "int32", "bool")}


def value(name: str, dims: Sequence[int | str | None], dtype: str = "float32") -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, DTYPES[np.dtype(dtype)], dims)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: Mapping[str, NDArray] | None = None,
    opset: int = 21,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(np.asarray(w), n) for n, w in (weights or {}).items()]
    graph = helper.make_graph(nodes, "theirs", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in (domains or {}).items())]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions))


@dataclass
class Theirs:
    """A file of somebody else's: the model, how to import it, inputs to draw."""

    model: onnx.ModelProto
    states: str = ""
    options: dict = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        path = folder / "theirs.onnx"
        onnx.save(self.model, path)
        return path

    def read(self, folder: Path) -> Imported:
        states = (self.states,) if self.states else ()
        return import_onnx(self.write(folder), ImportOptions(states, **self.options))


class Stream:
    """A model on stock onnxruntime that keeps the state named by pairs (input, output)."""

    def __init__(
        self, model: onnx.ModelProto, state: dict[str, str], constants: Mapping[str, NDArray] | None = None
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.pairs, self.constants = state, dict(constants or {})
        self.state: dict[str, NDArray] = {}

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Outputs by name, those that are state included."""
        names = [o.name for o in self.session.get_outputs()]
        feeds = {**self.constants, **inputs, **self.state}
        wanted = {i.name for i in self.session.get_inputs()}
        made = dict(zip(names, self.session.run(names, {n: v for n, v in feeds.items() if n in wanted}), strict=True))
        self.state = {i: made[o] for i, o in self.pairs.items()}
        return made


def drawn(imported: Imported, rng: np.random.Generator) -> dict[str, NDArray]:
    """Inputs of one step."""
    return {
        s.name: (rng.standard_normal(s.shape) if "float" in s.dtype else rng.integers(0, 3, s.shape)).astype(s.dtype)
        for s in imported.manifest.step.signature.inputs
    }


def compare(theirs: Theirs, imported: Imported, steps: int = 3, relative: float = 2e-6) -> None:
    """The file as it came and the graph the compiler reads, both on onnxruntime, from one random state."""
    slots = {s.name: s for s in imported.manifest.step.signature.state}
    first = Stream(theirs.model, dict(imported.names.values()), imported.constants)
    ours = Stream(imported.model, {f"past.{s}": f"present.{s}" for s in slots})
    rng = np.random.default_rng(3)
    for name, slot in slots.items():
        ours.state[f"past.{name}"] = np.full(slot.shape, slot.init, slot.dtype)
        if name in imported.names:
            start = rng.standard_normal(slot.shape).astype(slot.dtype)
            ours.state[f"past.{name}"] = start
            first.state[imported.names[name][0]] = start
    for step in range(steps):
        inputs = drawn(imported, rng)
        want, got = first.run(inputs), ours.run(inputs)
        for name, (_, theirs_name) in imported.names.items():
            close(got[f"present.{name}"], want[theirs_name], relative, f"{name} after step {step}")
        for spec in imported.manifest.step.signature.outputs:
            close(got[spec.name], want[spec.name], relative, f"{spec.name} of step {step}")


def close(got: NDArray, want: NDArray, relative: float, what: str) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, what
    bound = relative * max(1.0, float(np.abs(want).max(initial=0)))
    worst = float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0))
    assert worst <= bound, f"{what}: {worst} > {bound}"
