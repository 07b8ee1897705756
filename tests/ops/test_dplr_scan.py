"""DPLRScan: numpy, torch and the ONNX body agree; what it says it contains, it contains."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.models import functional as ops
from edgeseq.ops import all_ops
from edgeseq.ops.dplr_scan import dplr_scan
from edgeseq.verify.tolerances import tolerance
from tests.ops.one_node import inferred_shapes, model, run

KEYS = ("q", "k", "g", "a", "b")


def draw(seed: int, b: int, t: int, h: int, k: int, v: int) -> dict[str, np.ndarray]:
    """A contracting transition: decays below 1 and |a| |b| < 1, as RWKV-7's normalised removal key guarantees."""
    rng = np.random.default_rng(seed)
    given = {name: rng.standard_normal((b, t, h * k)).astype(np.float32) for name in KEYS}
    given["g"] = -np.abs(given["g"])
    norm = np.linalg.norm(given["a"].reshape(b, t, h, k), axis=-1, keepdims=True)
    given["a"] = (given["a"].reshape(b, t, h, k) / norm).reshape(b, t, h * k)
    given["b"] = -given["a"] * rng.uniform(0, 1, (b, t, h * k)).astype(np.float32)
    given["v"] = rng.standard_normal((b, t, h * v)).astype(np.float32)
    return given | {"past": rng.standard_normal((b, h, k, v)).astype(np.float32)}


def by_torch(inputs: dict[str, np.ndarray], heads: int, scale: float) -> list[np.ndarray]:
    order = ("q", "k", "v", "g", "a", "b", "past")
    return [x.numpy() for x in ops.dplr_scan(*(torch.from_numpy(inputs[n].copy()) for n in order), heads, scale)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 9, 4, 6, 7))), seed=st.integers(0, 999), data=st.data(),
    scale=st.sampled_from([1.0, 0.25, -0.5]),
)  # fmt: skip
def test_body_schema_torch_and_numpy_agree_under_any_cut(sizes, seed, data, scale) -> None:
    inputs, op = draw(seed, *sizes), all_ops()["DPLRScan"]
    heads, tokens = sizes[2], sizes[1]
    attributes = {"num_heads": heads, "scale": scale}
    wanted = dplr_scan(**{n: x.astype(np.float64) for n, x in inputs.items()}, **attributes)
    proto = model(op, inputs, attributes)
    shapes = inferred_shapes(proto)
    found = run(proto, inputs)
    for param, onnx_, torch_, reference in zip(op.outputs, found, by_torch(inputs, heads, scale), wanted, strict=True):
        assert onnx_.shape == torch_.shape == reference.shape == shapes[param.name]
        for got in (onnx_, torch_):
            assert np.abs(got - reference).max() <= tolerance("onnx", "float32", reference), param.name
    cut = data.draw(st.integers(1, tokens))
    first = {n: x[:, :cut] if n != "past" else x for n, x in inputs.items()}
    head, state = by_torch(first, heads, scale)
    if cut < tokens:
        rest = {n: x[:, cut:] if n != "past" else state for n, x in inputs.items()}
        tail, state = by_torch(rest, heads, scale)
        head = np.concatenate([head, tail], 1)
    np.testing.assert_allclose(head, found[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, found[1], rtol=1e-5, atol=1e-5)


def test_both_terms_read_the_old_state() -> None:
    """One head, two keys, one value, by hand."""
    row = lambda *x: np.array([[x]], np.float64)  # noqa: E731
    past = np.array([[[[3.0], [5.0]]]])
    given = {"q": row(1.0, 10.0), "k": row(2.0, 0.5), "v": row(7.0), "g": row(np.log(0.5), np.log(0.1))}
    o, state = dplr_scan(**given, a=row(1.0, -1.0), b=row(4.0, 6.0), past=past, scale=2.0)
    read = 3.0 - 5.0
    first, second = 0.5 * 3 + 4 * read + 2 * 7, 0.1 * 5 + 6 * read + 0.5 * 7
    np.testing.assert_allclose(state.ravel(), [first, second])
    assert o.item() == pytest.approx(2.0 * (first + 10 * second))


def test_gated_delta_rule_is_a_special_case() -> None:
    inputs = {n: x.astype(np.float64) for n, x in draw(4, 2, 6, 2, 5, 3).items()}
    beta = np.random.default_rng(1).uniform(0, 1, (2, 6, 2))
    spread = np.repeat(beta, 5, -1)
    v = inputs["v"] * np.repeat(beta, 3, -1)
    o, state = dplr_scan(
        **inputs | {"a": np.exp(inputs["g"]) * inputs["k"], "b": -spread * inputs["k"], "v": v}, num_heads=2
    )
    torch_args = [torch.from_numpy(inputs[n]) for n in ("q", "k", "v", "past", "g")]
    want, kept = ops.linear_attention(*torch_args, torch.from_numpy(beta), "gated_delta", 2, 2)
    np.testing.assert_allclose(o, want, atol=1e-12)
    np.testing.assert_allclose(state, kept, atol=1e-12)


@pytest.mark.parametrize(
    ("broken", "attributes"),
    [({"a": (1, 2, 5)}, {"num_heads": 2}), ({}, {"num_heads": 3}), ({}, {"num_heads": 2, "scale": 0.0})],
)
def test_inference_refuses_shapes_that_do_not_fit(broken: dict, attributes: dict) -> None:
    shapes = dict.fromkeys(KEYS, (1, 2, 4)) | {"v": (1, 2, 6), "past": (1, 2, 2, 3)} | broken
    inputs = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError), match="DPLRScan"):
        model(all_ops()["DPLRScan"], inputs, attributes)
