"""DiagScan and DenseScan: numpy, torch and the ONNX body agree under any cut; the state means what its page says."""

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
from edgeseq.verify.tolerances import tolerance
from tests.ops.one_node import inferred_shapes, model, run

Inputs = dict[str, np.ndarray]
TORCH = {"DiagScan": scan_op.diag_scan, "DenseScan": scan_op.dense_scan}


def draw(op: str, seed: int, b: int, t: int, c: int, n: int, skip: bool, shared: bool = False) -> Inputs:
    """Contractions: |a| below 1 in every mode, and every matrix scaled below norm 1."""
    rng = np.random.default_rng(seed)
    u, d = rng.standard_normal((b, t, c)), rng.standard_normal(c)
    if op == "DiagScan":
        radius, angle = rng.uniform(0.3, 0.999, (2, n, 1 if shared else c))
        poles = radius * np.exp(6.0j * angle)
        weights = {"a": np.stack([poles.real, poles.imag], 1), "c": rng.standard_normal((n, 2, c))}
        past = rng.standard_normal((b, n, 2, c))
    else:
        a = rng.standard_normal((n, n, c))
        weights = {"a": 0.95 * a / np.linalg.norm(a.transpose(2, 0, 1), 2, axis=(1, 2))}
        weights |= {"b": rng.standard_normal((n, c)), "c": rng.standard_normal((n, c))}
        past = rng.standard_normal((b, n, c))
    inputs = {"u": u, **weights, **({"d": d} if skip else {}), "past": past}
    return {name: x.astype(np.float32) for name, x in inputs.items()}


def by_torch(op: str, inputs: Inputs) -> list[np.ndarray]:
    args = {name: torch.from_numpy(x.copy()) for name, x in inputs.items()}
    return [x.numpy() for x in TORCH[op](**({"d": None} | args))]


sizes = st.tuples(*(st.integers(1, n) for n in (3, 9, 20, 7)))


@pytest.mark.parametrize("name", TORCH)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(size=sizes, seed=st.integers(0, 999), skip=st.booleans(), shared=st.booleans(), data=st.data())
def test_body_schema_torch_and_numpy_agree_under_any_cut(
    name: str, size: tuple[int, ...], seed: int, skip: bool, shared: bool, data: Any
) -> None:
    inputs, op = draw(name, seed, *size, skip, shared), all_ops()[name]
    wanted = op.reference(**{key: x.astype(np.float64) for key, x in inputs.items()})
    proto = model(op, inputs, {})
    shapes = inferred_shapes(proto)
    for param, onnx_, torch_, reference in zip(
        op.outputs, run(proto, inputs), by_torch(name, inputs), wanted, strict=True
    ):
        assert onnx_.shape == torch_.shape == reference.shape == shapes[param.name]
        for got in (onnx_, torch_):
            assert np.abs(got - reference).max() <= tolerance("onnx", "float32", reference), param.name
    cut = data.draw(st.integers(1, size[1]))
    head, state = by_torch(name, inputs | {"u": inputs["u"][:, :cut]})
    if cut < size[1]:
        tail, state = by_torch(name, inputs | {"u": inputs["u"][:, cut:], "past": state})
        head = np.concatenate([head, tail], 1)
    whole = by_torch(name, inputs)
    np.testing.assert_allclose(head, whole[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state, whole[1], rtol=1e-6, atol=1e-6)


def test_modes_are_powers_of_complex_numbers() -> None:
    """The answer to one impulse is Re(c a^t), with the skip in the first token only."""
    a, c = 0.9 * np.exp(0.4j), 1.5 - 0.7j
    u = np.zeros((1, 6, 1))
    u[0, 0] = 2.0
    pair = [np.array([[[z.real], [z.imag]]]) for z in (a, c)]
    y, state = all_ops()["DiagScan"].reference(u, *pair, np.array([0.25]))
    want = [2.0 * (c * a**t).real for t in range(6)]
    want[0] += 0.5
    assert y.reshape(-1) == pytest.approx(want)
    assert state.reshape(-1) == pytest.approx([(2 * a**5).real, (2 * a**5).imag])


def test_a_dense_step_by_hand() -> None:
    """Rows before columns: x = [[1, 2], [0, 1]] x + [1, 3] u."""
    a, b, c = np.array([[1.0, 2.0], [0.0, 1.0]])[..., None], np.array([[1.0], [3.0]]), np.array([[1.0], [10.0]])
    y, state = all_ops()["DenseScan"].reference(np.array([[[1.0], [0.0]]]), a, b, c, np.array([0.5]))
    assert y.reshape(-1).tolist() == [1 + 30 + 0.5, 7 + 30]
    assert state.reshape(-1).tolist() == [7.0, 3.0]


@pytest.mark.parametrize(
    ("name", "broken", "shape", "message"),
    [
        ("DiagScan", "a", (2, 3, 5), "2=3"),
        ("DiagScan", "a", (2, 2, 4), "4 channels, wanted 1 or 5"),
        ("DiagScan", "past", (1, 4, 2, 5), "N=4"),
        ("DenseScan", "a", (2, 3, 5), "N=3"),
        ("DenseScan", "d", (4,), "C=4"),
    ],
)
def test_shapes_that_contradict_are_refused(name: str, broken: str, shape: tuple[int, ...], message: str) -> None:
    inputs = draw(name, 0, 1, 3, 5, 2, True) | {broken: np.zeros(shape, np.float32)}
    with pytest.raises((onnx.shape_inference.InferenceError, onnx.checker.ValidationError), match=message):
        inferred_shapes(model(all_ops()[name], inputs, {}))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", TORCH)
def test_the_torch_operators_declare_their_shapes(name: str, tokens: int) -> None:
    args = tuple(torch.from_numpy(x) for x in draw(name, 1, 2, tokens, 6, 3, True).values())
    operator = {"DiagScan": torch.ops.edgeseq.diag_scan, "DenseScan": torch.ops.edgeseq.dense_scan}[name]
    torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))
