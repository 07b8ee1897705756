"""GatedScan: numpy, torch, its parallel form and the ONNX body agree under any cut; what a state says holds."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.models.gated_scan_op import gated_scan, gated_scan_parallel
from edgeseq.ops import all_ops
from edgeseq.ops.gated_scan import gated_scan as definition
from edgeseq.verify.tolerances import tolerance
from tests.ops.one_node import inferred_shapes, model, run

TIMED = ("x", "log_a")


def draw(seed: int, b: int, t: int, d: int) -> dict[str, np.ndarray]:
    """Decays from all but 1 to all but 0."""
    rng = np.random.default_rng(seed)
    given = {"x": rng.standard_normal((b, t, d)), "log_a": -(10.0 ** rng.uniform(-6, 2, (b, t, d)))}
    given["past"] = rng.standard_normal((b, d)) if seed % 2 else np.zeros((b, d))
    return {name: x.astype(np.float32) for name, x in given.items()}


def by_torch(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [x.numpy() for x in gated_scan(*(torch.from_numpy(x.copy()) for x in inputs.values()))]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=st.tuples(*(st.integers(1, n) for n in (3, 19, 20))), seed=st.integers(0, 999), data=st.data())
def test_body_schema_torch_and_numpy_agree_under_any_cut(sizes, seed, data) -> None:  # type: ignore[no-untyped-def]
    inputs, op = draw(seed, *sizes), all_ops()["GatedScan"]
    wanted = definition(**{name: x.astype(np.float64) for name, x in inputs.items()})
    proto = model(op, inputs, {})
    shapes = inferred_shapes(proto)
    for param, onnx_, torch_, reference in zip(op.outputs, run(proto, inputs), by_torch(inputs), wanted, strict=True):
        assert onnx_.shape == torch_.shape == reference.shape == shapes[param.name]
        for got in (onnx_, torch_):
            assert np.abs(got - reference).max() <= tolerance("onnx", "float32", reference), param.name
    cut = data.draw(st.integers(1, sizes[1]))
    head, state = by_torch({n: x[:, :cut] if n in TIMED else x for n, x in inputs.items()})
    if cut < sizes[1]:
        tail, state = by_torch({n: x[:, cut:] if n in TIMED else x for n, x in (inputs | {"past": state}).items()})
        head = np.concatenate([head, tail], 1)
    assert (head == by_torch(inputs)[0]).all()
    assert (state == by_torch(inputs)[1]).all()


@pytest.mark.parametrize("tokens", [2, 3, 7, 64, 100])
def test_parallel_form_and_its_gradients(tokens: int) -> None:
    inputs = draw(2, 2, tokens, 5)
    wide = [torch.from_numpy(inputs[n].astype(np.float64)).requires_grad_() for n in TIMED]
    x, log_a = wide
    state, steps = torch.zeros(2, 5, dtype=torch.float64), []
    for t in range(tokens):
        state = torch.exp(log_a[:, t]) * state + x[:, t]
        steps.append(state)
    weight = torch.randn(2, tokens, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    serial, parallel = torch.stack(steps, 1), gated_scan_parallel(x, log_a)
    assert (serial - parallel).abs().max() < 1e-12 * max(1.0, float(serial.detach().abs().max()))
    for one, two in zip(*(torch.autograd.grad((y * weight).sum(), wide) for y in (serial, parallel)), strict=True):
        assert (one - two).abs().max() < 1e-11 * max(1.0, float(one.abs().max()))


def test_by_hand() -> None:
    """A decay of a half, then one that forgets."""
    x, log_a = np.array([[[4.0], [1.0], [3.0]]]), np.array([[[np.log(0.5)], [np.log(0.5)], [-np.inf]]])
    h, present = definition(x, log_a, np.array([[2.0]]))
    assert h.reshape(-1).tolist() == [5.0, 3.5, 3.0]
    assert present.tolist() == [[3.0]]


@pytest.mark.parametrize(
    ("name", "shape", "message"), [("log_a", (1, 3, 4), "D=4"), ("past", (1, 4), "D=4"), ("x", (1, 5), "3 axes|2 axes")]
)
def test_shapes_that_contradict_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    inputs = draw(0, 1, 3, 5) | {name: np.zeros(shape, np.float32)}
    with pytest.raises((onnx.shape_inference.InferenceError, onnx.checker.ValidationError), match=message):
        inferred_shapes(model(all_ops()["GatedScan"], inputs, {}))
