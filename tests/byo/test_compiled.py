"""Imported files through the compiler: kernels of this machine, scratch full of NaN, blocks in any order.

Half of it is about state: an output may be the state of another, a past may be read after its place has a new owner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from edgeseq.compiler.foreign import Imported
from tests.compiler.machine import Machine

from .recurrent_cases import CASES, layer
from .support import Stream, Theirs, close, drawn, model_of, value
from .test_control_flow import SCANS, branches, loop

ROW = [1, 8]


def states(
    *nodes: Any, slots: int = 2, weights: dict[str, NDArray] | None = None, outputs: tuple[str, ...] = ("y",)
) -> Theirs:
    """States s0, s1 … and an input x, all [1,8]; nodes are (operator, inputs, output)."""
    made = [helper.make_node(op, list(inputs), [out]) for op, inputs, out in nodes]
    names = [f"s{i}" for i in range(slots)]
    return Theirs(
        model_of(
            made, [value(n, ROW) for n in ("x", *names)], [value(n, ROW) for n in (*(f"{s}n" for s in names), "y")],
            weights,
        ),
        ",".join(f"{s}:{s}n" for s in names),
    )  # fmt: skip


W = {"W": np.random.default_rng(9).standard_normal((8, 8)).astype(np.float32)}
STATES = {
    "swap": states(("Identity", ["s1"], "s0n"), ("Identity", ["s0"], "s1n"), ("Add", ["x", "s0"], "y")),
    "rotate three": states(
        ("Identity", ["s1"], "s0n"), ("Identity", ["s2"], "s1n"), ("Add", ["s0", "x"], "s2n"), ("Neg", ["s0"], "y"),
        slots=3,
    ),
    "old value leaves after the new one is written": states(
        ("Add", ["s0", "x"], "s0n"), ("MatMul", ["s0n", "W"], "p"), ("Add", ["p", "s0"], "y"),
        ("Identity", ["s0"], "s1n"), weights=W,
    ),
    "delay line": states(("Identity", ["x"], "s0n"), ("Identity", ["s0"], "s1n"), ("Identity", ["s1"], "y")),
    "one value, two states and an output": states(
        ("MatMul", ["s0", "W"], "p"), ("Add", ["p", "x"], "q"), ("Tanh", ["q"], "t"), ("Identity", ["t"], "s0n"),
        ("Identity", ["t"], "s1n"), ("Identity", ["t"], "y"), weights=W,
    ),
    "input is state and output": states(("Identity", ["x"], "s0n"), ("Identity", ["x"], "y"), slots=1),
    "state never changes": states(("Identity", ["s0"], "s0n"), ("Mul", ["x", "s0"], "y"), slots=1),
    "product into its own state": states(
        ("MatMul", ["s0", "W"], "p"), ("Tanh", ["p"], "s0n"), ("Add", ["s0", "x"], "y"), slots=1, weights=W,
    ),
    "two products meet": states(
        ("MatMul", ["s0", "W"], "p"), ("MatMul", ["x", "W"], "q"), ("Add", ["p", "q"], "r"), ("Tanh", ["r"], "s0n"),
        ("MatMul", ["r", "W"], "y"), slots=1, weights=W,
    ),
}  # fmt: skip
LAYERS = {
    name: CASES[name]
    for name in ("lstm", "lstm-both-ways", "lstm-clip", "gru-reset-after", "gru-reset-before", "rnn-relu-both-ways")
} | {"lstm-wide": layer("LSTM", T=2, I=40, H=48, scale=0.1), "gru-wide": layer("GRU", I=33, H=50, scale=0.1)}
FLOW = {f"scan {n}": SCANS[n] for n in ("forward", "time last")} | {"loop": loop(), "if": branches("computed")}
EVERY = STATES | LAYERS | FLOW


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Imported]:
    return {name: theirs.read(tmp_path_factory.mktemp("theirs")) for name, theirs in EVERY.items()}


@pytest.fixture(scope="module")
def machine(imported: dict[str, Imported], tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("kernels"), {name: i.model for name, i in imported.items()})


@pytest.mark.parametrize("name", EVERY)
def test_as_onnxruntime_says(name: str, imported: dict[str, Imported], machine: Machine) -> None:
    found, theirs = machine.step(name), imported[name]
    first = Stream(EVERY[name].model, dict(theirs.names.values()), theirs.constants)
    rng = np.random.default_rng(11)
    for slot in theirs.manifest.step.signature.state:
        start = rng.standard_normal(slot.shape).astype(slot.dtype)
        found.state[slot.name][...] = start
        first.state[theirs.names[slot.name][0]] = start
    for step in range(5):
        inputs = drawn(theirs, rng)
        want, got = first.run(inputs), found(**inputs)
        for slot_name, (_, theirs_name) in theirs.names.items():
            close(found.state[slot_name], want[theirs_name], 1e-5, f"{slot_name} after step {step}")
        for output in got:
            close(got[output], want[output], 1e-5, f"{output} of step {step}")


def test_the_matrices_of_layers_are_products_with_packed_weights(machine: Machine) -> None:
    """No layer multiplies by a matrix in the slow generic way, nor transposes one at run time."""
    for name in LAYERS:
        kernels = [call.kernel for call in machine.programs[name].calls]
        labels = [k.label for k in kernels if hasattr(k, "label")]
        assert not any("matmul" in label or "transpose" in label for label in labels), (name, labels)
        assert any(getattr(k, "op", "") == "linear" for k in kernels), name


@pytest.mark.parametrize("name", ["swap", "lstm"])
def test_the_same_file_is_read_the_same(name: str, imported: dict[str, Imported], tmp_path: Path) -> None:
    again = EVERY[name].read(tmp_path)
    assert again.model.SerializeToString() == imported[name].model.SerializeToString()
    assert again.manifest == imported[name].manifest


def test_an_index_out_of_range_reads_the_nearest_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Data of a user, never memory beside it; and nobody warns on stderr of what cannot happen."""
    theirs = Theirs(
        model_of(
            [helper.make_node("Tanh", ["x"], ["t"]), helper.make_node("Gather", ["t", "i"], ["y"], axis=1)],
            [value("x", [1, 5]), value("i", [4], "int64")], [value("y", [1, 4])],
        )
    )  # fmt: skip
    found = Machine(tmp_path, {"gather": theirs.read(tmp_path).model}).step("gather")
    x = np.float32([[1, 2, 3, 4, 5]])
    y = found(x=x, i=np.int64([0, -1, 1 << 40, -(1 << 40)]))["y"]
    np.testing.assert_allclose(y, np.tanh(x[:, [0, 4, 4, 0]]), atol=1e-6)
    assert "Warning" not in capfd.readouterr().err
