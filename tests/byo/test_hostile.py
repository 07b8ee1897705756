"""Files that lie or are damaged: one sentence each, no traceback, no memory, no time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeseq.compiler.foreign import ImportOptions, import_onnx
from edgeseq.errors import CompileError, EdgeseqError, UsageError

from .recurrent_cases import CASES
from .support import Theirs, model_of, value
from .test_control_flow import SCANS, branches


def read_bytes(data: bytes, folder: Path, states: str) -> None:
    path = folder / "theirs.onnx"
    path.write_bytes(data)
    import_onnx(path, ImportOptions((states,)))


FILES = {"lstm": CASES["lstm-4-steps"], "scan": SCANS["forward"], "if": branches("shape")}


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes(name: str, tmp_path: Path) -> None:
    """Truncated, flipped, overwritten: whatever is not read as some model is refused by name."""
    whole = FILES[name].model.SerializeToString()
    rng = np.random.default_rng(5)
    refused = 0
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: int(rng.integers(0, len(data)))]
        for _ in range(int(rng.integers(1, 6)) if data else 0):
            data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
        try:
            read_bytes(bytes(data), tmp_path, FILES[name].states)
        except EdgeseqError as error:
            refused += 1
            assert error.sentence and "\n" not in error.sentence
    assert refused > 50


def test_not_onnx_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        import_onnx(tmp_path / "nothing.onnx", ImportOptions())
    for data in (b"", b"\x00" * 100, b"PK\x03\x04 a zip", b'{"json": 1}'):
        with pytest.raises(CompileError, match="is not a readable ONNX file"):
            read_bytes(data, tmp_path, "a:b")


def test_shapes_that_no_tensor_has(tmp_path: Path) -> None:
    for dims in ([-1, 4], [1 << 40, 1 << 40]):
        model = model_of([helper.make_node("Add", ["s", "w"], ["sn"])], [value("s", [4])], [value("sn", [4])])
        tensor = model.graph.initializer.add()
        tensor.name, tensor.data_type = "w", 1
        tensor.dims[:] = dims
        with pytest.raises(CompileError, match="which no tensor has"):
            Theirs(model, "s:sn").read(tmp_path)


BOMBS = {
    "ConstantOfShape": ([helper.make_node("ConstantOfShape", ["big"], ["c"])], np.int64([1 << 20, 1 << 20])),
    "Expand": ([helper.make_node("Expand", ["one", "big"], ["c"])], np.int64([1 << 20, 1 << 20])),
    "Tile": ([helper.make_node("Tile", ["one", "big"], ["c"])], np.int64([1 << 40])),
    "Range": ([helper.make_node("Range", ["zero", "big", "step"], ["c"])], np.float32(1e12)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_constants_that_would_fill_the_memory_are_not_folded(name: str, tmp_path: Path) -> None:
    nodes, big = BOMBS[name]
    model = model_of(
        [
            *nodes, helper.make_node("ReduceSum", ["c"], ["total"], keepdims=0),
            helper.make_node("Add", ["s", "total"], ["sn"]),
        ],
        [value("s", [4])], [value("sn", [4])],
        {"big": big, "one": np.float32([1]), "zero": np.float32(0), "step": np.float32(1)},
    )  # fmt: skip
    begin = time.process_time()
    try:
        imported = Theirs(model, "s:sn").read(tmp_path)
        assert imported.model.ByteSize() < 1 << 20
    except EdgeseqError as error:
        assert error.sentence
    assert time.process_time() - begin < 20


@pytest.mark.slow
def test_nested_bodies_multiply_and_are_stopped(tmp_path: Path) -> None:
    """Four loops of 200 steps in one another: 1.6e9 additions in half a page."""
    F = onnx.TensorProto.FLOAT

    def loop(depth: int) -> onnx.GraphProto:  # fmt: skip
        i, c, v, co, vo = (f"{n}{depth}" for n in ("i", "c", "v", "co", "vo"))
        inner = (
            helper.make_node("Loop", ["trips", "yes", v], [vo], body=loop(depth - 1))
            if depth
            else helper.make_node("Add", [v, v], [vo])
        )
        return helper.make_graph(
            [inner, helper.make_node("Identity", [c], [co])], f"body{depth}",
            [value(i, [], "int64"), value(c, [], "bool"), helper.make_tensor_value_info(v, F, [1])],
            [value(co, [], "bool"), helper.make_tensor_value_info(vo, F, [1])],
        )  # fmt: skip

    model = model_of(
        [helper.make_node("Loop", ["trips", "yes", "s"], ["sn"], body=loop(3))], [value("s", [1])], [value("sn", [1])],
        {"trips": np.int64(200), "yes": np.bool_(True)},
    )  # fmt: skip
    begin = time.process_time()
    with pytest.raises(CompileError, match="too long to unroll"):
        Theirs(model, "s:sn").read(tmp_path)
    assert time.process_time() - begin < 60
