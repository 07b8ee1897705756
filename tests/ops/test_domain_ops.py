"""Every operator of the domain: schema = function body on stock onnxruntime = numpy, for any shape and any cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeseq.ops import DOMAIN, all_ops, register_all
from edgeseq.verify.tolerances import tolerance
from tests.ops.one_node import inferred_shapes, model, run

Case = tuple[str, dict[str, np.ndarray], dict[str, Any]]
TIME_AXIS = {"SelectiveScan": ("u", "dt", "B", "C", "z"), "Retention": ("q", "k", "v")}


@st.composite
def selective_scans(draw: st.DrawFn) -> Case:
    b, t, d, n = (draw(st.integers(1, high)) for high in (3, 9, 20, 8))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    shapes = {"u": (b, t, d), "dt": (b, t, d), "A": (n, d), "B": (b, t, n), "C": (b, t, n)}
    shapes |= {"D": (d,), "z": (b, t, d), "dt_bias": (d,), "past": (b, n, d)}
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["A"] = -np.abs(inputs["A"]) * 4
    inputs["dt"] = inputs["dt"] * 4 - 2
    for name in ("D", "z", "dt_bias"):
        if draw(st.booleans()):
            del inputs[name]
    attributes: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {"dt_min": 0.5},
                {"dt_max": 0.25},
                {"dt_softplus": 0},
                {"dt_softplus": 0, "dt_min": 0.1, "dt_max": 2.0},
            ]
        )
    )
    if attributes.get("dt_softplus") == 0:
        inputs["dt"] = np.abs(inputs["dt"])
    return "SelectiveScan", inputs, attributes


@st.composite
def retentions(draw: st.DrawFn) -> Case:
    b, t, h, k, v = (draw(st.integers(1, high)) for high in (3, 9, 4, 6, 7))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    shapes = {"q": (b, t, h * k), "k": (b, t, h * k), "v": (b, t, h * v), "log_decay": (h,), "past": (b, h, k, v)}
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["log_decay"] = -np.abs(inputs["log_decay"])
    return "Retention", inputs, {"num_heads": h, "scale": draw(st.sampled_from([1.0, 0.25, -0.5]))}


cases = st.one_of(selective_scans(), retentions())
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@few
@given(cases)
def test_body_equals_numpy_and_schema(case: Case) -> None:
    name, inputs, attributes = case
    op = all_ops()[name]
    proto = model(op, inputs, attributes)
    wide = {key: value.astype(np.float64) for key, value in inputs.items()}
    wanted = op.reference(**wide, **attributes)
    found = run(proto, inputs)
    shapes = inferred_shapes(proto)
    for param, ours, reference in zip(op.outputs, found, wanted, strict=True):
        assert ours.shape == reference.shape == shapes[param.name]
        assert np.abs(ours - reference).max() <= tolerance("onnx", "float32", reference), param.name


@few
@given(cases, st.data())
def test_cuts_through_the_state_change_nothing(case: Case, data: st.DataObject) -> None:
    name, inputs, attributes = case
    op = all_ops()[name]
    timed = TIME_AXIS[name]
    tokens = inputs[timed[0]].shape[1]
    cut = data.draw(st.integers(0, tokens))
    whole_y, whole_state = run(model(op, inputs, attributes), inputs)
    state, pieces = inputs["past"], []
    for piece in (slice(0, cut), slice(cut, tokens)):
        if piece.start == piece.stop:
            continue
        part = {key: value[:, piece] if key in timed else value for key, value in inputs.items()} | {"past": state}
        y, state = run(model(op, part, attributes), part)
        pieces.append(y)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole_y, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state, whole_state, rtol=1e-6, atol=1e-6)


def test_ops_are_found_by_their_files() -> None:
    assert {"Retention", "SelectiveScan"} <= set(all_ops())
    register_all()
    register_all()  # idempotent
    for name in all_ops():
        assert onnx.defs.get_schema(name, 1, DOMAIN).has_type_and_shape_inference_function


def test_dt_min_and_dt_max_bound_the_step() -> None:
    """By hand: A = 0 keeps the state, so present - past = clipped dt * u * B."""
    reference = all_ops()["SelectiveScan"].reference
    one = np.ones((1, 1, 1))
    for dt, bounds, wanted in ((5.0, {"dt_max": 2.0}, 2.0), (-9.0, {"dt_min": 0.5}, 0.5)):
        _, state = reference(one, dt * one, 0 * one[0], one, one, past=0 * one, **bounds)
        assert state.item() == pytest.approx(wanted)
    _, state = reference(one, 30.0 * one, 0 * one[0], one, one, past=0 * one)
    assert state.item() == 30.0  # softplus is the identity above 20


@pytest.mark.parametrize(
    ("name", "broken", "attributes"),
    [
        ("SelectiveScan", {"A": (3, 5)}, {}),
        ("SelectiveScan", {"past": (1, 4, 3)}, {}),
        ("SelectiveScan", {}, {"dt_min": 2.0, "dt_max": 1.0}),
        ("Retention", {"q": (1, 2, 5)}, {"num_heads": 2}),
        ("Retention", {}, {"num_heads": 3}),
        ("Retention", {}, {"num_heads": 2, "scale": 0.0}),
    ],
)
def test_inference_refuses_shapes_that_do_not_fit(name: str, broken: dict, attributes: dict) -> None:
    by_op: dict[str, dict[str, tuple[int, ...]]] = {
        "SelectiveScan": {"A": (3, 4), "past": (1, 3, 4)}
        | dict.fromkeys(("u", "dt"), (1, 2, 4))
        | dict.fromkeys(("B", "C"), (1, 2, 3)),
        "Retention": {"q": (1, 2, 4), "k": (1, 2, 4), "v": (1, 2, 6), "log_decay": (2,), "past": (1, 2, 2, 3)},
    }
    shapes = by_op[name] | broken
    inputs = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError), match=name):
        model(all_ops()[name], inputs, attributes)


def test_variants_of_one_op_share_a_file() -> None:
    """Two signatures in one graph: overloads keep their bodies apart."""
    op = all_ops()["SelectiveScan"]
    full = frozenset(p.name for p in op.inputs)
    tags = {op.function(full - set(missing)).overload for missing in ((), ("D",), ("z",), ("D", "z", "dt_bias"))}
    assert len(tags) == 4
    assert op.function(full, {"dt_max": 1.0}).overload != op.function(full, {"dt_max": math.inf}).overload == ""
