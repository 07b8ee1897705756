"""ExpertLinear and its quantised form: numpy, torch, the ONNX bodies on stock onnxruntime and the schemas agree."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.models.experts_op import expert_linear, expert_linear_parallel
from edgeseq.ops import all_ops
from edgeseq.verify.tolerances import tolerance
from exporters.rounding import dequantise, quantise
from tests.ops.one_node import inferred_shapes, model, run

SUM = {"y": "[B,T,M]"}


def draw(seed: int, b: int, t: int, a: int, e: int, m: int, k: int) -> dict[str, np.ndarray]:
    """Some choices are none; x is one row a token or one a choice; gates are there or not."""
    rng = np.random.default_rng(seed)
    inputs = {"x": rng.standard_normal((b, t, a if seed % 2 else 1, k)).astype(np.float32)}
    inputs["index"] = rng.integers(-1, e, (b, t, a))
    inputs["w"] = rng.standard_normal((e * m, k)).astype(np.float32)
    if seed % 4 > 1:
        inputs["gates"] = rng.standard_normal((b, t, a)).astype(np.float32)
    return inputs


sizes = st.tuples(*(st.integers(1, n) for n in (3, 5, 4, 5, 9, 37)))
some = settings(max_examples=24, deadline=None, derandomize=True)


@some
@given(sizes=sizes, seed=st.integers(0, 999))
def test_body_schema_torch_and_numpy_agree(sizes: tuple[int, ...], seed: int) -> None:
    inputs, op, experts = draw(seed, *sizes), all_ops()["ExpertLinear"], {"num_experts": sizes[3]}
    wide = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in inputs.items()}
    (wanted,) = op.reference(**wide, **experts)
    proto = model(op, inputs, experts, SUM if "gates" in inputs else None)
    x, index, w, *gates = (torch.from_numpy(v) for v in inputs.values())
    found = [run(proto, inputs)[0]]
    found += [f(x, index, w, sizes[3], *gates).numpy() for f in (expert_linear, expert_linear_parallel)]
    for got in found:
        assert got.shape == wanted.shape == inferred_shapes(proto)["y"]
        assert np.abs(got - wanted).max() <= tolerance("onnx", "float32", wanted)


@some
@given(sizes=sizes, seed=st.integers(0, 999), bits=st.sampled_from([4, 8]))
def test_quantised_matrices_are_what_their_codes_mean(sizes: tuple[int, ...], seed: int, bits: int) -> None:
    inputs, attributes = draw(seed, *sizes), {"num_experts": sizes[3], "bits": bits}
    codes, scales = quantise("w", inputs.pop("w"), bits)
    coded = {n: inputs[n] for n in ("x", "index")} | {"codes": codes, "scales": scales}
    coded |= {n: inputs[n] for n in ("gates",) if n in inputs}
    op, plain = all_ops()["ExpertLinearNBits"], all_ops()["ExpertLinear"]
    wide = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in coded.items()}
    (wanted,) = op.reference(**wide, **attributes)
    whole = dequantise(codes, scales, sizes[5]).astype(np.float64)
    (by_matrix,) = plain.reference(
        inputs["x"].astype(np.float64), inputs["index"], whole, inputs.get("gates"), sizes[3]
    )
    assert np.abs(by_matrix - wanted).max() <= 1e-12 * max(1.0, np.abs(wanted).max())
    proto = model(op, coded, attributes, SUM if "gates" in coded else None)
    (found,) = run(proto, coded)
    assert found.shape == wanted.shape == inferred_shapes(proto)["y"]
    assert np.abs(found - wanted).max() <= tolerance("onnx", "float32", wanted)


def test_by_hand() -> None:
    w = np.array([[1.0, 0.0], [0.0, 10.0]])  # two experts of one row
    x, index = np.array([[[[2.0, 3.0]]]]), np.array([[[1, 0, -1]]])
    (y,) = all_ops()["ExpertLinear"].reference(x, index, w, num_experts=2)
    assert y.reshape(-1).tolist() == [30.0, 2.0, 0.0]
    (y,) = all_ops()["ExpertLinear"].reference(x, index, w, np.array([[[0.5, 2.0, 7.0]]]), num_experts=2)
    assert y.reshape(-1).tolist() == [19.0]


@pytest.mark.parametrize(
    ("name", "shape", "experts", "message"),
    [
        ("w", (7, 5), 2, "7 rows cannot be"),
        ("w", (6, 4), 2, "K=5"),
        ("x", (1, 3, 2, 5), 2, "2 inputs of a token for its 3"),
        ("index", (1, 4, 3), 2, "T=3"),
        ("w", (6, 5), 0, "6 rows cannot be"),
    ],
)
def test_shapes_that_contradict_are_refused(name: str, shape: tuple[int, ...], experts: int, message: str) -> None:
    inputs = draw(0, 1, 3, 3, 2, 3, 5)
    inputs[name] = np.zeros(shape, inputs[name].dtype)
    with pytest.raises((onnx.shape_inference.InferenceError, onnx.checker.ValidationError), match=message):
        inferred_shapes(model(all_ops()["ExpertLinear"], inputs, {"num_experts": experts}))


def test_codes_of_another_width_are_refused() -> None:
    inputs = draw(0, 1, 2, 2, 2, 3, 40)
    codes, scales = quantise("w", inputs["w"], 8)
    coded = {"x": inputs["x"], "index": inputs["index"], "codes": codes, "scales": scales}
    op = all_ops()["ExpertLinearNBits"]
    inferred_shapes(model(op, coded, {"num_experts": 2, "bits": 8}))
    for change in (
        {"bits": 4},
        {"bits": 5},
        {"bits": 8, "scales": scales[:, :1]},
        {"bits": 8, "x": coded["x"][..., :9]},
    ):
        attributes = {"num_experts": 2, "bits": change.pop("bits")}
        with pytest.raises((onnx.shape_inference.InferenceError, onnx.checker.ValidationError)):
            inferred_shapes(model(op, coded | change, attributes))
