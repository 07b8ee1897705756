"""If, Scan and Loop leave no trace: branches chosen, bodies repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeseq.errors import CompileError

from .support import Theirs, compare, model_of, value

F = "float32"


def scan(T: int = 5, axis: int = 0, back: int = 0, out_axis: int = 0, out_back: int = 0, B: int = 2) -> Theirs:
    """h' = 0.5 h + W x_t;  y_t = tanh(h') * gain, with a weight of the outer graph and one of the body."""
    frame = [B, 3]
    whole = list(frame)
    whole.insert(axis, T)
    rows = list(frame)
    rows.insert(out_axis, T)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["xt", "W"], ["wx"]),
            helper.make_node("Mul", ["h_in", "half"], ["kept"]),
            helper.make_node("Add", ["kept", "wx"], ["h_out"]),
            helper.make_node("Tanh", ["h_out"], ["squashed"]),
            helper.make_node("Mul", ["squashed", "gain"], ["yt"]),
        ],
        "body",
        [value("h_in", frame), value("xt", frame)],
        [value("h_out", frame), value("yt", frame)],
        [onnx.numpy_helper.from_array(np.float32(0.5), "half")],
    )
    attributes: dict[str, Any] = {
        "scan_input_axes": [axis], "scan_input_directions": [back], "scan_output_axes": [out_axis],
        "scan_output_directions": [out_back],
    }  # fmt: skip
    node = helper.make_node("Scan", ["h", "x"], ["hn", "y"], num_scan_inputs=1, body=body, **attributes)
    gain = helper.make_node("Exp", ["g"], ["gain"])
    weight = np.random.default_rng(1).standard_normal((3, 3)).astype(F)
    inputs = [value("x", whole), value("g", [3]), value("h", frame)]
    return Theirs(model_of([gain, node], inputs, [value("y", rows), value("hn", frame)], {"W": weight}), "h:hn")


SCANS = {
    "forward": scan(),
    "backward": scan(back=1),
    "rows backward": scan(out_back=1),
    "time in the middle": scan(axis=1, out_axis=1),
    "time last": scan(axis=2, out_axis=2, back=1, out_back=1),
    "one step": scan(T=1),
}


@pytest.mark.parametrize("name", SCANS)
def test_scan(name: str, tmp_path: Path) -> None:
    imported = SCANS[name].read(tmp_path)
    assert "Scan" not in {n.op_type for n in imported.model.graph.node}
    compare(SCANS[name], imported)


def test_two_scans_of_one_body_and_a_scan_in_a_scan(tmp_path: Path) -> None:
    """Names of one copy must not meet those of the next."""
    inner = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["sum", "scale"], ["r"])],
        "inner", [value("a", [2]), value("b", [2])], [value("sum", [2]), value("r", [2])],
    )  # fmt: skip
    outer = helper.make_graph(
        [
            helper.make_node("Scan", ["carry", "rows"], ["carry2", "made"], num_scan_inputs=1, body=inner),
            helper.make_node("Identity", ["carry2"], ["carry3"]),
        ],
        "outer", [value("carry", [2]), value("rows", [3, 2])], [value("carry3", [2]), value("made", [3, 2])],
    )  # fmt: skip
    nodes = [
        helper.make_node("Scan", ["s", "x"], ["s1", "y1"], num_scan_inputs=1, body=outer),
        helper.make_node("Scan", ["s1", "x"], ["sn", "y2"], num_scan_inputs=1, body=outer),
        helper.make_node("Sub", ["y2", "y1"], ["y"]),
    ]
    theirs = Theirs(
        model_of(
            nodes, [value("x", [4, 3, 2]), value("s", [2])], [value("y", [4, 3, 2]), value("sn", [2])],
            {"scale": np.float32([0.5, -2])},
        ),
        "s:sn",
    )  # fmt: skip
    compare(theirs, theirs.read(tmp_path))


def loop(trips: int = 4, condition: str = "constant") -> Theirs:
    """A for loop as torch.jit writes it: counter, condition passed on, state, rows."""
    nodes = [
        helper.make_node("Cast", ["i"], ["step"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["step", "x"], ["moved"]),
        helper.make_node("Add", ["v", "moved"], ["v_out"]),
        helper.make_node("Neg", ["v_out"], ["row"]),
    ]
    if condition == "computed":
        nodes.append(helper.make_node("ReduceMax", ["v_out"], ["top"], keepdims=0))
        nodes.append(helper.make_node("Less", ["top", "limit"], ["goes_on"]))
    elif condition == "constant":
        nodes.append(helper.make_node("Identity", ["yes"], ["goes_on"]))
    else:
        nodes.append(helper.make_node("Identity", ["ok"], ["goes_on"]))
    body = helper.make_graph(
        nodes, "body", [value("i", [], "int64"), value("ok", [], "bool"), value("v", [3])],
        [value("goes_on", [], "bool"), value("v_out", [3]), value("row", [3])],
    )  # fmt: skip
    node = helper.make_node("Loop", ["trips", "yes", "s"], ["sn", "y"], body=body)
    weights = {"trips": np.int64(trips), "yes": np.bool_(True), "limit": np.float32(1)}
    return Theirs(
        model_of([node], [value("x", [3]), value("s", [3])], [value("y", [trips, 3]), value("sn", [3])], weights),
        "s:sn",
    )


@pytest.mark.parametrize("condition", ["constant", "passed on"])
def test_loop(condition: str, tmp_path: Path) -> None:
    theirs = loop(condition=condition)
    imported = theirs.read(tmp_path)
    assert "Loop" not in {n.op_type for n in imported.model.graph.node}
    compare(theirs, imported)


def test_loops_that_may_stop_or_are_too_long_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="may stop early"):
        loop(condition="computed").read(tmp_path)
    with pytest.raises(CompileError, match="1025 steps .* too long to unroll"):
        loop(trips=1025).read(tmp_path)
    with pytest.raises(CompileError, match="2000 steps .* too long to unroll"):
        scan(T=2000).read(tmp_path)


def branches(condition: str) -> Theirs:
    """if condition: y = W x + s else: y = x * s; both know names of the outer graph."""
    yes = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["p"]), helper.make_node("Add", ["p", "s"], ["a"])],
        "yes", [], [value("a", [1, 3])],
    )  # fmt: skip
    no = helper.make_graph([helper.make_node("Mul", ["x", "s"], ["b"])], "no", [], [value("b", [1, 3])])
    nodes, inputs = [], [value("x", [1, 3]), value("s", [1, 3])]
    weights = {"W": np.random.default_rng(2).standard_normal((3, 3)).astype(F), "rate": np.int64(16000)}
    options: dict[str, Any] = {}
    if condition == "value":
        inputs.append(value("sr", [], "int64"))
        nodes.append(helper.make_node("Equal", ["sr", "rate"], ["c"]))
        options = {"values": {"sr": "16000"}}
    elif condition == "shape":
        weights["one"] = np.int64([3])
        weights["last"] = np.int64(1)
        nodes.append(helper.make_node("Shape", ["x"], ["dims"]))
        nodes.append(helper.make_node("Gather", ["dims", "last"], ["size"]))
        nodes.append(helper.make_node("Equal", ["size", "one"], ["c"]))
    else:
        nodes.append(helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0))
        weights["zero"] = np.float32(0)
        nodes.append(helper.make_node("Greater", ["sum", "zero"], ["c"]))
    nodes.append(helper.make_node("If", ["c"], ["y"], then_branch=yes, else_branch=no))
    nodes.append(helper.make_node("Tanh", ["y"], ["sn"]))
    return Theirs(model_of(nodes, inputs, [value("y", [1, 3]), value("sn", [1, 3])], weights), "s:sn", options)


@pytest.mark.parametrize("condition", ["value", "shape", "computed"])
def test_if(condition: str, tmp_path: Path) -> None:
    theirs = branches(condition)
    imported = theirs.read(tmp_path)
    ops = {n.op_type for n in imported.model.graph.node}
    assert "If" not in ops
    assert ("Where" in ops) == (condition == "computed"), "a constant condition leaves one branch"
    compare(theirs, imported, steps=6)
