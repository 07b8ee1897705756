"""What a user may say about a file, and the one sentence that answers what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from edgeseq.compiler.foreign.options import state_pairs
from edgeseq.errors import CompileError, EdgeseqError, UsageError
from edgeseq.spec import TensorSpec

from .support import Stream, Theirs, compare, model_of, value

names = st.text("ab:,.=/", min_size=1, max_size=4)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=3, unique_by=(lambda p: p[0], lambda p: p[1])))
def test_pairs_of_any_names_are_found_again(pairs: list[tuple[str, str]]) -> None:
    """One pair an option: no name is too strange. In one option, names without commas and colons."""
    inputs, outputs = [p[0] for p in pairs], [p[1] for p in pairs]
    try:
        found = state_pairs(tuple(f"{a}:{b}" for a, b in pairs), inputs, outputs)
    except UsageError:
        found = None  # two readings, of which the first leaves a name twice or unpaired
    plain = not any(c in name for p in pairs for name in p for c in ":,")
    if plain:
        assert found == pairs
        assert state_pairs((",".join(f"{a}:{b}" for a, b in pairs),), inputs, outputs) == pairs
    elif found is not None:
        assert set(found) <= {(a, b) for a in inputs for b in outputs}


def filters(batch: int | str | None = "batch", width: int | str | None = 4, rate: bool = True) -> Theirs:
    """y = x * rate + s;  sn = 0.5 y"""
    shape = [batch, width]
    nodes = [
        helper.make_node("Cast", ["rate"], ["r"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "r"], ["scaled"]),
        helper.make_node("Add", ["scaled", "s"], ["y"]),
        helper.make_node("Mul", ["y", "half"], ["sn"]),
    ]
    inputs = [value("x", shape), value("s", shape), *([value("rate", [], "int64")] if rate else [])]
    weights = {"half": np.float32(0.5)} | ({} if rate else {"rate": np.int64(3)})
    return Theirs(model_of(nodes, inputs, [value("y", shape), value("sn", shape)], weights), "s:sn")


def read(theirs: Theirs, folder: Path, states: str = "s:sn", **options: Any):  # type: ignore[no-untyped-def]
    return Theirs(theirs.model, states, options).read(folder)


def test_shapes_dims_and_values(tmp_path: Path) -> None:
    wanted = {"x": (2, 4), "s": (2, 4)}
    for options in ({"shapes": wanted}, {"dims": {"batch": 2}}, {"shapes": {"x": (2, 4)}, "dims": {"batch": 2}}):
        found = read(filters(), tmp_path, values={"rate": "3"}, **options)
        signature = found.manifest.step.signature
        assert signature.inputs == (TensorSpec("x", "float32", (2, 4)),)
        assert signature.outputs == (TensorSpec("y", "float32", (2, 4)),)
        assert [(s.name, s.shape, s.init) for s in signature.state] == [("s", (2, 4), 0.0)]
        compare(filters(), found)
    left_open = read(filters(), tmp_path, dims={"batch": 1}).manifest.step.signature
    assert [(s.name, s.dtype, s.shape) for s in left_open.inputs] == [("x", "float32", (1, 4)), ("rate", "int64", ())]


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no such input": ({"states": "q:sn"}, "the input 'q', which the file does not have"),
    "no such output": ({"states": "s:q"}, "the output 'q', which the file does not have"),
    "not a pair": ({"states": "s"}, "'s' is not NAME_IN:NAME_OUT"),
    "half a pair": ({"states": "s:"}, "'s:' is not NAME_IN:NAME_OUT"),
    "input twice": ({"states": "s:sn,s:y"}, "uses the input 's' twice"),
    "output twice": ({"states": "s:y,x:y"}, "uses the output 'y' twice"),
    "open dimension": ({"values": {"rate": "1"}}, r"axis 0 of input 'x' has no size: the file says \[batch, 4\]"),
    "no such shape": ({"shapes": {"z": (1, 4)}}, "the input 'z', which the file does not have"),
    "wrong rank": ({"shapes": {"x": (4,)}}, "gives 'x' 1 dimensions"),
    "against the file": ({"shapes": {"x": (1, 5)}}, "axis 1 of 'x' the size 5, elsewhere it is 4"),
    "against a dim": ({"shapes": {"x": (2, 4)}, "dims": {"batch": 1}}, "axis 0 of 'x' the size 2, elsewhere it is 1"),
    "no such dim": ({"dims": {"time": 1}}, "'time', which is no symbolic dimension"),
    "no such value": ({"dims": {"batch": 1}, "values": {"z": "1"}}, "'z', which the file does not have"),
    "not a number": ({"dims": {"batch": 1}, "values": {"rate": "fast"}}, "rate=fast is not a number"),
    "not an integer": ({"dims": {"batch": 1}, "values": {"rate": "1.5"}}, "rate=1.5 does not fit int64"),
    "too many numbers": ({"dims": {"batch": 1}, "values": {"rate": "1,2"}}, "2 numbers, its shape .* holds 1"),
    "value of a state": ({"dims": {"batch": 1}, "values": {"s": "1"}}, "--state and --value both name 's'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, tmp_path: Path) -> None:
    options, sentence = REFUSALS[name]
    with pytest.raises(UsageError, match=sentence) as caught:
        read(filters(), tmp_path, **options)
    assert "\n" not in caught.value.sentence and caught.value.hint


def simple(nodes: list[onnx.NodeProto], inputs: Any, outputs: Any, weights: Any = None, states: str = "s:sn") -> Theirs:
    return Theirs(model_of(nodes, inputs, outputs, weights), states)


def test_a_state_that_changes_its_shape_or_type_is_refused(tmp_path: Path) -> None:
    grows = simple(
        [helper.make_node("Concat", ["s", "x"], ["sn"], axis=1)],
        [value("x", [1, 1]), value("s", [1, 4])], [value("sn", [1, 5])],
    )  # fmt: skip
    with pytest.raises(CompileError, match=r"state s is float32\[1, 4\] but comes back as float32\[1, 5\] from sn"):
        grows.read(tmp_path)
    turns = simple(
        [helper.make_node("Cast", ["s"], ["sn"], to=onnx.TensorProto.INT64)],
        [value("s", [1, 4])], [value("sn", [1, 4], "int64")],
    )  # fmt: skip
    with pytest.raises(CompileError, match=r"comes back as int64\[1, 4\]"):
        turns.read(tmp_path)


def test_what_has_no_static_shape_or_kernel_is_refused(tmp_path: Path) -> None:
    x, s, sn = value("x", [1, 4]), value("s", [1, 4]), value("sn", [1, 4])
    keep = helper.make_node("Add", ["s", "x"], ["sn"])
    ragged = simple([keep, helper.make_node("NonZero", ["x"], ["y"])], [x, s], [value("y", [2, None], "int64"), sn])
    with pytest.raises(CompileError, match=r"the shape of y \(NonZero\) is not static"):
        ragged.read(tmp_path)
    double = simple(
        [
            keep,
            helper.make_node("Cast", ["x"], ["d"], to=onnx.TensorProto.DOUBLE),
            helper.make_node("Cast", ["d"], ["y"], to=onnx.TensorProto.FLOAT),
        ],
        [x, s], [value("y", [1, 4]), sn],
    )  # fmt: skip
    with pytest.raises(CompileError, match=r"d \(Cast\) is double, which is not supported"):
        double.read(tmp_path)
    five = [1] * 5
    deep = simple([keep, helper.make_node("Neg", ["z"], ["y"])], [x, s, value("z", five)], [value("y", five), sn])
    with pytest.raises(CompileError, match="z has 5 dimensions, a bundle stores at most 4"):
        deep.read(tmp_path)
    undeclared = simple(
        [helper.make_node("Add", ["past.h", "x"], ["y"])], [x, value("past.h", [1, 4])], [value("y", [1, 4])], states=""
    )
    with pytest.raises(UsageError, match="'past.h' is named like a state but is not declared"):
        undeclared.read(tmp_path)


def test_initial_values_of_the_file(tmp_path: Path) -> None:
    """An initializer under a state's name is its first value: one number for all, or one each."""
    node = helper.make_node("Add", ["s", "x"], ["sn"])
    same = helper.make_node("Mul", ["t", "x"], ["tn"])
    first = np.float32([[1, -2, 3, 4]])
    theirs = Theirs(
        model_of(
            [node, same], [value("x", [1, 4]), value("s", [1, 4]), value("t", [1, 4])],
            [value("sn", [1, 4]), value("tn", [1, 4])], {"s": first, "t": np.full((1, 4), 0.25, np.float32)},
        ),
        "s:sn,t:tn",
    )  # fmt: skip
    imported = theirs.read(tmp_path)
    slots = imported.manifest.step.signature.state
    assert [(s.name, s.init) for s in slots] == [("s", 0.0), ("t", 0.25), ("started", 0.0)]
    stream = Stream(imported.model, {f"past.{s.name}": f"present.{s.name}" for s in slots})
    stream.state = {f"past.{s.name}": np.full(s.shape, s.init, np.float32) for s in slots}
    x = np.float32([[1, 1, 2, 2]])
    one, two = stream.run({"x": x}), stream.run({"x": x})
    np.testing.assert_array_equal(one["present.s"], first + x)
    np.testing.assert_array_equal(two["present.s"], first + 2 * x)
    np.testing.assert_array_equal(two["present.t"], 0.25 * x * x)


def test_functions_of_the_file_are_inlined(tmp_path: Path) -> None:
    """A function that calls another, twice, with an attribute; old ONNX lists its weights as inputs, too."""
    leaky = helper.make_function(
        "theirs", "Leaky", ["a"], ["b"], [helper.make_node("LeakyRelu", ["a"], ["b"])],
        [helper.make_opsetid("", 21)], ["alpha"],
    )  # fmt: skip
    attribute = leaky.node[0].attribute.add()
    attribute.name, attribute.ref_attr_name, attribute.type = "alpha", "alpha", onnx.AttributeProto.FLOAT
    cell = helper.make_function(
        "theirs", "Cell", ["x", "h", "w"], ["n"],
        [
            helper.make_node("MatMul", ["h", "w"], ["p"]),
            helper.make_node("Add", ["p", "x"], ["q"]),
            helper.make_node("Leaky", ["q"], ["n"], domain="theirs", alpha=0.3),
        ],
        [helper.make_opsetid("", 21), helper.make_opsetid("theirs", 1)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Cell", ["x", "s", "w"], ["h1"], domain="theirs"),
        helper.make_node("Cell", ["x", "h1", "w"], ["sn"], domain="theirs"),
        helper.make_node("Tanh", ["sn"], ["y"]),
    ]
    model = model_of(
        nodes, [value("x", [1, 3]), value("s", [1, 3]), value("w", [3, 3])], [value("y", [1, 3]), value("sn", [1, 3])],
        {"w": np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)},
        functions=[leaky, cell], domains={"theirs": 1},
    )  # fmt: skip
    theirs = Theirs(model, "s:sn")
    imported = theirs.read(tmp_path)
    assert {n.op_type for n in imported.model.graph.node} == {"MatMul", "Add", "LeakyRelu", "Tanh"}
    assert [s.name for s in imported.manifest.step.signature.inputs] == ["x"]
    compare(theirs, imported)


def test_external_data_stays_in_its_file(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    model = model_of(
        [helper.make_node("MatMul", ["s", "w"], ["p"]), helper.make_node("Add", ["p", "x"], ["sn"])],
        [value("x", [1, 64]), value("s", [1, 64])], [value("sn", [1, 64])], {"w": weight},
    )  # fmt: skip
    path = tmp_path / "theirs.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=16)
    from edgeseq.compiler.foreign import ImportOptions, import_onnx

    imported = import_onnx(path, ImportOptions(("s:sn",)))
    (held,) = [t for t in imported.model.graph.initializer if list(t.dims) == [64, 64]]
    assert held.data_location == onnx.TensorProto.EXTERNAL
    first = imported.manifest.model_id
    (tmp_path / "weights.bin").write_bytes(weight[::-1].tobytes())
    assert import_onnx(path, ImportOptions(("s:sn",))).manifest.model_id != first, "other weights are another model"


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "", "missing.bin"])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    model = filters(1, rate=False).model
    tensor = model.graph.initializer.add()
    tensor.name, tensor.data_type, tensor.data_location = "w", 1, onnx.TensorProto.EXTERNAL
    tensor.dims[:] = [4]
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    with pytest.raises(EdgeseqError, match="points to"):
        Theirs(model, "s:sn").read(folder)
