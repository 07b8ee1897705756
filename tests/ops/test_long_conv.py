"""LongConvStep: numpy, torch and the ONNX body agree at any position under any cut; unwritten rows are never read."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.models import scan_op
from edgeseq.ops import all_ops
from edgeseq.ops.long_conv import long_conv
from edgeseq.verify.tolerances import tolerance
from tests.ops.one_node import inferred_shapes, model, run

Inputs = dict[str, np.ndarray]


def draw(seed: int, b: int, t: int, c: int, taps: int, before: int, after: int, skip: bool) -> Inputs:
    """`before` tokens of history, `after` rows never written, which hold NaN."""
    rng = np.random.default_rng(seed)
    past = np.full((b, before + t + after, c), np.nan, np.float32)
    past[:, :before] = rng.standard_normal((b, before, c))
    inputs = {"x": rng.standard_normal((b, t, c)), "h": rng.standard_normal((taps, c)), "d": rng.standard_normal(c)}
    inputs = {name: a.astype(np.float32) for name, a in inputs.items() if skip or name != "d"}
    return inputs | {"past": past, "position": np.full(b, before)}


def by_torch(inputs: Inputs) -> list[np.ndarray]:
    args = {name: torch.from_numpy(a.copy()) for name, a in inputs.items()}
    return [y.numpy() for y in scan_op.long_conv(**({"d": None} | args))]


def wide(inputs: Inputs) -> Inputs:
    return {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in inputs.items()}


sizes = st.tuples(*(st.integers(1, n) for n in (3, 7, 9, 12)), st.integers(0, 9), st.integers(0, 5))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(size=sizes, seed=st.integers(0, 999), skip=st.booleans(), data=st.data())
def test_body_schema_torch_and_numpy_agree_under_any_cut(
    size: tuple[int, ...], seed: int, skip: bool, data: Any
) -> None:
    inputs, op = draw(seed, *size, skip), all_ops()["LongConvStep"]
    wanted = long_conv(**wide(inputs))
    proto = model(op, inputs, {})
    shapes = inferred_shapes(proto)
    for param, onnx_, torch_, reference in zip(op.outputs, run(proto, inputs), by_torch(inputs), wanted, strict=True):
        assert onnx_.shape == torch_.shape == reference.shape == shapes[param.name]
        for got in (onnx_, torch_):
            written = np.isfinite(reference)
            assert (np.isnan(got) == ~written).all(), param.name
            limit = tolerance("onnx", "float32", reference[written])
            assert np.abs(got - reference)[written].max() <= limit, param.name
    cut = data.draw(st.integers(1, size[1]))
    head, state = by_torch(inputs | {"x": inputs["x"][:, :cut]})
    if cut < size[1]:
        tail, state = by_torch(
            inputs | {"x": inputs["x"][:, cut:], "past": state, "position": inputs["position"] + cut}
        )
        head = np.concatenate([head, tail], 1)
    np.testing.assert_array_equal(head, by_torch(inputs)[0])
    np.testing.assert_array_equal(state, by_torch(inputs)[1])


def test_streams_of_one_batch_may_stand_at_different_positions() -> None:
    inputs = draw(3, 2, 2, 4, 5, 6, 1, True)
    mixed = inputs | {"position": np.array([6, 2])}
    apart = [
        long_conv(**{n: a[i : i + 1] if n in ("x", "past", "position") else a for n, a in mixed.items()})
        for i in range(2)
    ]
    for got in (run(model(all_ops()["LongConvStep"], mixed, {}), mixed), by_torch(mixed)):
        np.testing.assert_allclose(got[0], np.concatenate([y for y, _ in apart]), rtol=1e-5, atol=1e-5)


def test_it_is_numpys_convolution_cut_to_the_past() -> None:
    rng = np.random.default_rng(0)
    x, h = rng.standard_normal(30), rng.standard_normal(12)
    y, present = long_conv(x[None, :, None], h[:, None], np.array([0.5]))
    assert y.reshape(-1) == pytest.approx(np.convolve(x, h)[:30] + 0.5 * x)
    assert (present.reshape(-1) == x).all()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("h", (4, 6), "C=6"), ("past", (1, 2, 5), "history of 2"), ("d", (3,), "C=3"), ("position", (2,), "B=2")],
)
def test_shapes_that_contradict_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    inputs = draw(0, 1, 3, 5, 4, 2, 0, True)
    inputs[name] = np.zeros(shape, inputs[name].dtype)
    with pytest.raises((onnx.shape_inference.InferenceError, onnx.checker.ValidationError), match=message):
        inferred_shapes(model(all_ops()["LongConvStep"], inputs, {}))


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_torch_operator_declares_its_shapes(tokens: int) -> None:
    args = tuple(torch.from_numpy(a).nan_to_num() for a in draw(1, 2, tokens, 6, 5, 3, 2, True).values())
    torch.library.opcheck(torch.ops.edgeseq.long_conv.default, args, test_utils=("test_schema", "test_faketensor"))


def test_a_full_history_is_an_error() -> None:
    args = {n: torch.from_numpy(a) for n, a in draw(0, 1, 2, 3, 4, 5, 0, True).items()}
    with pytest.raises(IndexError, match="holds 7 tokens, but 8"):
        scan_op.long_conv(**(args | {"position": torch.tensor([6])}))
