"""WKV4: numpy, torch and the ONNX body agree under any cut; what its state says holds."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.models import functional as ops
from edgeseq.ops import all_ops
from edgeseq.ops.wkv4 import FRESH, wkv4
from edgeseq.verify.tolerances import tolerance
from tests.ops.one_node import inferred_shapes, model, run

TIMED = ("k", "v")


def draw(seed: int, b: int, t: int, c: int, spread: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    given = {"k": spread * rng.standard_normal((b, t, c)), "v": rng.standard_normal((b, t, c))}
    given |= {"time_decay": rng.uniform(-6, 3, c), "time_first": rng.standard_normal(c)}
    given["past"] = np.full((b, 3, c), FRESH)
    if seed % 2:
        given["past"] = rng.standard_normal((b, 3, c))
        given["past"][:, 1] = 0.1 + np.abs(given["past"][:, 1])
        given["past"][:, 2] *= spread
    return {name: x.astype(np.float32) for name, x in given.items()}


def by_torch(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [x.numpy() for x in ops.wkv4(*(torch.from_numpy(x.copy()) for x in inputs.values()))]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 9, 20))), seed=st.integers(0, 999),
    spread=st.sampled_from([1.0, 5.0, 30.0]), data=st.data(),
)  # fmt: skip
def test_body_schema_torch_and_numpy_agree_under_any_cut(sizes, seed, spread, data) -> None:  # type: ignore[no-untyped-def]
    inputs, op = draw(seed, *sizes, spread), all_ops()["WKV4"]
    wanted = wkv4(**{name: x.astype(np.float64) for name, x in inputs.items()})
    proto = model(op, inputs, {})
    shapes = inferred_shapes(proto)
    for param, onnx_, torch_, reference in zip(op.outputs, run(proto, inputs), by_torch(inputs), wanted, strict=True):
        assert onnx_.shape == torch_.shape == reference.shape == shapes[param.name]
        for got in (onnx_, torch_):
            assert np.abs(got - reference).max() <= spread * tolerance("onnx", "float32", reference), param.name
    cut = data.draw(st.integers(1, sizes[1]))
    head, state = by_torch({n: x[:, :cut] if n in TIMED else x for n, x in inputs.items()})
    if cut < sizes[1]:
        tail, state = by_torch({n: x[:, cut:] if n in TIMED else x for n, x in (inputs | {"past": state}).items()})
        head = np.concatenate([head, tail], 1)
    assert (head == by_torch(inputs)[0]).all()
    assert (state == by_torch(inputs)[1]).all()


def test_by_hand() -> None:
    """Two tokens of weight e^k: the second output is their average, the first one decayed once less than the state."""
    k, v = np.array([[[0.0], [1.0]]]), np.array([[[2.0], [5.0]]])
    o, state = wkv4(k, v, np.array([np.log(0.5)]), np.array([0.25]), np.full((1, 3, 1), FRESH))
    own = np.exp(0.25 + 1.0)
    assert o.reshape(-1) == pytest.approx([2.0, (2.0 + own * 5.0) / (1.0 + own)])
    scale = np.exp(state[0, 2, 0])
    decayed, last = np.exp(-0.5), np.exp(1.0)
    assert state[0, :2, 0] * scale == pytest.approx([decayed * 2.0 + last * 5.0, decayed + last])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("past", (1, 2, 5), "3"), ("v", (1, 3, 4), "C=4"), ("time_first", (6,), "C=6"), ("k", (1, 5), "3 axes|2 axes")],
)
def test_shapes_that_contradict_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    inputs = draw(0, 1, 3, 5, 1.0) | {name: np.zeros(shape, np.float32)}
    with pytest.raises((onnx.shape_inference.InferenceError, onnx.checker.ValidationError), match=message):
        inferred_shapes(model(all_ops()["WKV4"], inputs, {}))


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_torch_operator_declares_its_shapes(tokens: int) -> None:
    args = tuple(torch.from_numpy(x) for x in draw(1, 2, tokens, 6, 1.0).values())
    torch.library.opcheck(torch.ops.edgeseq.wkv4.default, args, test_utils=("test_schema", "test_faketensor"))
