"""ONNX graphs through the compiler's own stages and a few lines of Python in the place of linker and C runtime.

`Machine` lowers many graphs, puts their kernels into one library, and `Step` runs one of them like the runtime does:
blocks in any order, scratch full of NaN before every step, state in place.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeseq.bundle.plan import align
from edgeseq.compiler.graph import Weight, load_graph
from edgeseq.compiler.ir import Arg, Call, Storage
from edgeseq.compiler.lowering import Lowering, Memory
from edgeseq.compiler.memory import mark_outputs_only, place, plan_arena
from edgeseq.compiler.pack import pack
from edgeseq.compiler.targets import resolve
from edgeseq.spec import DTYPE_BYTES, StateSlot, StepSignature, TensorSpec

from .library import DeviceLibrary, Library

OPSET = 27
DTYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "int32": TensorProto.INT32,
}
NAMES = {v: k for k, v in DTYPES.items()}


def port(name: str, shape: Iterable[int], dtype: str = "float32") -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, DTYPES[dtype], list(shape))


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: Mapping[str, NDArray] | None = None,
    functions: Iterable[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    initializers = [onnx.numpy_helper.from_array(np.asarray(w), name) for name, w in (weights or {}).items()]
    graph = helper.make_graph(nodes, "step", inputs, outputs, initializers)
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.edgeseq", 1)]
    return helper.make_model(graph, opset_imports=domains, functions=list(functions), ir_version=10)


def specs(values: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[str, tuple[int, ...]]]:
    types = {v.name: v.type.tensor_type for v in values}
    return {n: (NAMES[t.elem_type], tuple(d.dim_value for d in t.shape.dim)) for n, t in types.items()}


def signature_of(model: onnx.ModelProto, tokens: int = 1) -> StepSignature:
    """What the exporter would declare: every `past.x` is a slot, the rest are named inputs and outputs."""
    inputs, outputs = specs(model.graph.input), specs(model.graph.output)
    slots = [StateSlot(n.removeprefix("past."), *t) for n, t in inputs.items() if n.startswith("past.")]  # type: ignore[arg-type]
    return StepSignature(
        tokens,
        tuple(TensorSpec(n, *t) for n, t in inputs.items() if not n.startswith("past.")),  # type: ignore[arg-type]
        tuple(TensorSpec(n, *t) for n, t in outputs.items() if not n.startswith("present.")),  # type: ignore[arg-type]
        tuple(slots),
    )


class Program:
    """One lowered graph: calls, sizes of its spaces."""

    def __init__(
        self, model: onnx.ModelProto, label: str = "graph", memory: Memory | None = None, target: str = "host"
    ) -> None:
        self.model = model
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{label}.onnx"
            onnx.save(model, path)
            graph = load_graph(path)
        self.signature = signature_of(model)
        self.memory = memory or Memory()
        lowering = Lowering(graph, self.signature, self.memory, resolve(target))
        self.calls: list[Call] = lowering.run()
        mark_outputs_only(self.calls)
        self.arena = plan_arena(self.calls)
        self.state = place([self.memory.slot(s.name, s.nbytes) for s in self.signature.state])
        self.io = place(self.memory.io.values())


class Machine:
    """Programs whose kernels share one library; target: "host", or "opencl" where there is such a device."""

    def __init__(self, folder: Path, models: Mapping[str, onnx.ModelProto], target: str = "host") -> None:
        self.programs = {name: Program(model, name, target=target) for name, model in models.items()}
        refs = [(c.kernel, len(c.args)) for p in self.programs.values() for c in p.calls]
        self.library = Library(folder, refs) if target == "host" else DeviceLibrary(refs)

    def step(self, name: str) -> Step:
        return Step(self.programs[name], self.library)


class Step:
    """A stream of one program. Calling it consumes inputs by name and returns the outputs; `state` holds the slots."""

    def __init__(self, program: Program, library: Library | DeviceLibrary) -> None:
        self.program, self.library = program, library
        self.spaces = {
            k: _block(n) for k, n in (("arena", program.arena), ("state", program.state), ("io", program.io))
        }
        self.spaces["state"][:] = 0
        self.weights = {w: _packed(w, sources) for w, sources in program.memory.sources.items()}
        self.rng = np.random.default_rng(0)

    def __call__(self, **inputs: NDArray) -> dict[str, NDArray]:
        memory = self.program.memory
        for spec in self.program.signature.inputs:
            if spec.name in memory.io:
                self._view("io", memory.io[spec.name].offset, spec.dtype, spec.shape)[...] = inputs[spec.name]
        self.spaces["arena"][:] = 0xFF  # NaN as a float, -1 as an integer
        for call in self.program.calls:
            self._run(call)
        outputs = self.program.signature.outputs
        return {s.name: self._view("io", memory.io[s.name].offset, s.dtype, s.shape).copy() for s in outputs}

    @property
    def state(self) -> dict[str, NDArray]:
        memory = self.program.memory
        return {
            s.name: self._view("state", memory.state[s.name].offset, s.dtype, s.shape)
            for s in self.program.signature.state
        }

    def _run(self, call: Call) -> None:
        if isinstance(self.library, DeviceLibrary):
            arrays = [self._bytes(a) for a in call.args]
            access = "".join("r" if a.access == "r" else "w" for a in call.args)
            results = iter(self.library.call(call.kernel, arrays, access))
            for array, how in zip(arrays, access, strict=True):
                if how == "w":
                    array[:] = next(results)
            return
        name = self.library.kernels.names[call.kernel]
        function = getattr(self.library.native, name)
        function.restype = None
        pointers = [self._address(a) for a in call.args]
        for block in self.rng.permutation(self.library.kernels.grids[name]):
            function(*pointers, _int32(block))

    def _address(self, arg: Arg):  # type: ignore[no-untyped-def]
        value, storage = arg.value, arg.value.storage
        if storage.kind == "weight":
            return ctypes.c_void_p(self.weights[storage].ctypes.data)
        start = storage.offset + value.offset * DTYPE_BYTES[value.dtype]
        space = self.spaces[storage.kind]
        assert 0 <= start and start + value.span * DTYPE_BYTES[value.dtype] <= align(space.nbytes)
        return ctypes.c_void_p(space.ctypes.data + start)

    def _bytes(self, arg: Arg) -> NDArray:
        value, storage = arg.value, arg.value.storage
        if storage.kind == "weight":
            return self.weights[storage]
        start = storage.offset + value.offset * DTYPE_BYTES[value.dtype]
        return self.spaces[storage.kind][start : start + value.span * DTYPE_BYTES[value.dtype]]

    def _view(self, space: str, offset: int, dtype: str, shape: tuple[int, ...]) -> NDArray:
        count = int(np.prod(shape)) * DTYPE_BYTES[dtype]
        return self.spaces[space][offset : offset + count].view(dtype).reshape(shape)


def _int32(value: int):  # type: ignore[no-untyped-def]
    return ctypes.c_int32(int(value))


def _packed(storage: Storage, sources: tuple[Weight, ...]) -> NDArray:
    data = np.ascontiguousarray(pack(storage.layout, *(np.asarray(w.load()).reshape(w.shape) for w in sources)))
    block = _block(storage.nbytes)
    block[:] = data.reshape(-1).view(np.uint8)
    return block


def _block(nbytes: int) -> NDArray:
    """Zeroed memory on a 64-byte boundary."""
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def onnx_stream(model: onnx.ModelProto):  # type: ignore[no-untyped-def]
    """The same model on stock onnxruntime: a function of the inputs that keeps its own state."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    types = specs(model.graph.input)
    state = {n: np.zeros(shape, dtype) for n, (dtype, shape) in types.items() if n.startswith("past.")}

    def step(**inputs: NDArray) -> dict[str, NDArray]:
        wanted = {n: inputs[n] for n in types if not n.startswith("past.")}
        found = dict(zip(names, session.run(None, wanted | state)))
        state.update({"past." + n.removeprefix("present."): v for n, v in found.items() if n.startswith("present.")})
        return {n: v for n, v in found.items() if not n.startswith("present.")}

    step.state = state  # type: ignore[attr-defined]
    return step
