"""Graphs that no rule knows, compiled and run for several steps, against stock onnxruntime."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeseq.compiler.lowering import Memory
from edgeseq.errors import CompileError
from edgeseq.verify.tolerances import tolerance

from . import graphs
from .graphs import FLOAT, S2, Builder, S, X, Y
from .library import largest_frame
from .machine import Machine, Program, model_of, onnx_stream, port

STEPS = 4
DRAWN = {f"drawn-{seed}": seed for seed in range(10)}


MODELS = {n: graphs.by_hand(n) for n in graphs.CASES} | {n: graphs.at_random(s) for n, s in DRAWN.items()}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("generic"), MODELS)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("generic"), MODELS, "opencl")


def close(got: NDArray, want: NDArray, name: str) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    if got.dtype != np.float32:
        assert np.array_equal(got, want), name
        return
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite], equal_nan=True), name
    assert np.abs(got - want)[finite].max(initial=0) <= tolerance("runtime", "float32", want[finite]), name


def compare(machine: Machine, name: str, model: onnx.ModelProto, seed: int = 0) -> None:
    """STEPS steps side by side, from one random state, each then on its own."""
    ours, theirs = machine.step(name), onnx_stream(model)
    rng = np.random.default_rng(seed)
    for key, value in theirs.state.items():
        start = rng.standard_normal(value.shape) if value.dtype == np.float32 else rng.integers(0, 3, value.shape)
        theirs.state[key] = start.astype(value.dtype)
        ours.state[key.removeprefix("past.")][...] = theirs.state[key]
    for step in range(STEPS):
        inputs = {
            "x": (2 * rng.standard_normal((1, 3, 10))).astype(np.float32),
            "i": rng.integers(-9, 9, (1, 5)),
        }
        got, want = ours(**inputs), theirs(**inputs)
        for key, value in want.items():
            close(got[key], value, f"{name}: {key} of step {step}")
        for key, value in theirs.state.items():
            close(ours.state[key.removeprefix("past.")], value, f"{name}: {key} after step {step}")


@pytest.mark.parametrize("name", [*graphs.CASES, *DRAWN])
def test_graph(machine: Machine, name: str) -> None:
    compare(machine, name, machine.programs[name].model)


@pytest.mark.parametrize("name", [*graphs.CASES, *DRAWN])
def test_graph_on_a_gpu(device: Machine, name: str) -> None:
    compare(device, name, device.programs[name].model)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_more_graphs_at_random(seed: int, tmp_path: Path) -> None:
    model = graphs.at_random(seed)
    compare(Machine(tmp_path, {"drawn": model}), "drawn", model, seed)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
def test_large_intermediates_stay_off_the_stack(machine: Machine) -> None:
    """A pool thread has a stack of 1 MiB; the graph `large` needs megabytes between its reductions."""
    assert 0 < largest_frame(machine.library.assembly) <= 16384
    scratch = [a for c in machine.programs["large"].calls for a in c.args if a.value.storage.nbytes > 200_000]
    assert scratch, "the graph is large enough to matter"


def sorted_bytes(b: Builder) -> None:
    """Of a type that no rule sorts; TVM's sort is a function of its own runtime."""
    small = b.op("Cast", "x", to=TensorProto.INT8)
    b.nodes.append(helper.make_node("TopK", [small, b.const([10])], ["ordered", "places"]))
    b.op("Cast", "ordered", to=FLOAT, out="present.s")
    b.op("Neg", "x", out="y")


def random_numbers(b: Builder) -> None:
    b.op("RandomNormalLike", b.op("Tanh", "x"), out="present.s")
    b.op("Neg", "x", out="y")


def unknown_shape(b: Builder) -> None:
    b.op("Add", "x", b.op("Det", b.op("MatMul", "x", b.weight(10, 3))), out="y")
    b.op("Neg", "x", out="present.s")


def unknown_domain(b: Builder) -> None:
    b.op("Frobnicate", "x", domain="com.example", out="y")
    b.op("Neg", "x", out="present.s")


def bad_scan(b: Builder) -> None:
    """B and C are 10 wide, A has 3 states."""
    b.op("SelectiveScan", "x", "x", b.weight(3, 10), "x", "x", "", "", "", "past.s", out="y", domain="ai.edgeseq")
    b.op("Neg", "x", out="present.s")


REFUSED = {
    sorted_bytes: "operator TopK cannot be compiled",
    random_numbers: "operator RandomNormalLike cannot be compiled",
    unknown_shape: "operator Det",
    unknown_domain: "Frobnicate",
    bad_scan: "SelectiveScan: B",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda f: f.__name__)
def test_what_cannot_be_compiled_is_named_in_one_sentence(write: Callable[[Builder], None]) -> None:
    b = Builder()
    write(b)
    with pytest.raises(CompileError) as refusal:
        Program(model_of(b.nodes, [X, S], [Y, S2], b.weights), "refused")
    assert REFUSED[write] in refusal.value.sentence and refusal.value.sentence.startswith("refused.onnx: ")
    assert "\n" not in refusal.value.sentence


def test_constants_of_one_name_in_two_graphs_are_two_tensors() -> None:
    """The step and the chunk graph may both call a constant `c0`."""
    memory, offsets = Memory(), []
    for value in (1.0, 2.0, 1.0):
        b = Builder()
        b.op("Add", "x", b.const(np.full((1, 3, 5000), value), "float32"), out="y")
        program = Program(
            model_of(b.nodes, [port("x", [1, 3, 5000])], [port("y", [1, 3, 5000])], b.weights), memory=memory
        )
        (call,) = program.calls
        offsets.append(call.args[1].value.storage)
    assert offsets[0] is not offsets[1] and offsets[0] is offsets[2]


@pytest.mark.parametrize("op", ["GatherElements", "GatherND", "ScatterElements", "ScatterND"])
def test_indices_far_outside_reach_nothing_beside_their_tensor(op: str, tmp_path: Path) -> None:
    """They read or write what lies nearest; without that this test ends in a segmentation fault."""
    nd, writes = op.endswith("ND"), op.startswith("Scatter")
    b = Builder()
    index, written = b.op("Mul", "i", b.const(1)), [b.op("Mul", "u", b.const(1, "float32"))] if writes else []
    if nd:  # five pairs (0, row), each naming a row of ten
        index = b.op("Reshape", index, b.const([5, 2]))
        written = [b.op("Reshape", written[0], b.const([5, 10]))] if writes else []
    b.op(op, "x", index, *written, out="y", **({} if nd else {"axis": 1}))
    inputs = [port("x", [1, 3, 10]), port("i", [1, 1, 10], "int64")]
    inputs += [port("u", [5, 10] if nd else [1, 1, 10])] if writes else []
    shape = [1, 3, 10] if writes else [5, 10] if nd else [1, 1, 10]
    step = Machine(tmp_path, {"far": model_of(b.nodes, inputs, [port("y", shape)], b.weights)}).step("far")
    x = np.arange(30, dtype=np.float32).reshape(1, 3, 10)
    updates = {"u": np.full((5, 10) if nd else (1, 1, 10), 99, np.float32)} if writes else {}
    for far, row in ((10**12, 2), (-(10**12), 0)):
        found = step(x=x, i=np.full((1, 1, 10), far), **updates)["y"]
        wanted = x.copy()
        wanted[0, row] = 99
        assert np.array_equal(found, wanted if writes else np.broadcast_to(x[0, row], shape)), far
