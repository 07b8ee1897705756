"""Each operator as the exporter writes it: numpy in float64 = PyTorch = stock onnxruntime, step and chunk."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from edgeseq.models import functional as ops
from edgeseq.models import rotary
from edgeseq.ops import all_ops, standard
from edgeseq.spec import StateSlot, StepSignature, TensorSpec
from edgeseq.verify.tolerances import tolerance
from exporters.tidy import tidy
from exporters.trace import trace

D, N, K, H, HK, E, ROWS = (
    12,
    5,
    3,
    6,
    3,
    4,
    16,
)  # channels, states, taps, heads, key/value heads, head width, cache rows
FREQUENCY = rotary.turns(10000.0 ** -np.linspace(0, 1, E // 2))


class EveryOperator(nn.Module):
    """All operators side by side on the same inputs; integer arithmetic of the rotary angle included."""

    def advance(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, q: Tensor, k: Tensor, position: Tensor,
                conv: Tensor, ssm: Tensor, kv: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        ramp = torch.linspace(-1.0, 1.0, D)
        convolved, conv = ops.causal_conv(x, torch.stack([ramp, ramp * 2, ramp + 1], 1), None, conv, True)
        full, ssm = ops.selective_scan(x, dt, -torch.exp(ramp * torch.ones(N, 1)), B, C, ramp, x + 1, ramp, ssm)
        bare, _ = ops.selective_scan(x, dt, -torch.ones(N, D), B, C, None, None, None, ssm * 0, dt_min=0.1, dt_max=1.0)
        angle = rotary.angles(torch.from_numpy(FREQUENCY), position, x.shape[1])
        turned = ops.rotary(q, *angle, H, False)
        paired = ops.rotary(q, *angle, H, True)
        kept, kv = ops.retention(q, q + 1, q - 1, -torch.linspace(0.1, 1.0, H), kv, H, 0.5)
        o, key, value = ops.cached_attention(turned, k, k + 1, key, value, position, H, HK, E**-0.5)
        normed = ops.rms_norm(x, ramp, 1e-5)
        plain = ops.rms_norm(q.unflatten(-1, (H, E)), None, 1e-5).flatten(-2)
        gated = torch.nn.functional.silu(x[..., 3:9]) * x[..., :6]
        return convolved, full, bare, paired, kept, o, normed, plain, gated, conv, ssm, kv, key, value


def signature(tokens: int) -> StepSignature:
    def spec(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, "float32", shape)

    def slot(name: str, *shape: int) -> StateSlot:
        return StateSlot(name, "float32", shape)

    inputs = [spec(name, 1, tokens, width) for name, width in (("x", D), ("dt", D), ("B", N), ("C", N), ("q", H * E))]
    inputs += [spec("k", 1, tokens, HK * E), TensorSpec("position", "int64", (1,), "position")]
    names = ("convolved", "full", "bare", "paired", "kept", "o", "normed", "plain", "gated")
    state = (
        slot("conv", 1, K - 1, D), slot("ssm", 1, N, D), slot("kv", 1, H, E, E),
        slot("key", 1, HK, ROWS, E), slot("value", 1, HK, ROWS, E),
    )  # fmt: skip
    return StepSignature(tokens, tuple(inputs), tuple(spec(name, 1) for name in names), state)


def by_numpy(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """EveryOperator from the references, in float64."""
    x, dt, B, C, q, k, position, conv, ssm, kv, key, value = (
        a if a.dtype == np.int64 else a.astype(np.float64) for a in feeds.values()
    )
    ramp, tokens = np.linspace(-1.0, 1.0, D), x.shape[1]
    scan, retain = all_ops()["SelectiveScan"].reference, all_ops()["Retention"].reference
    convolved, conv = standard.causal_conv(x, np.stack([ramp, ramp * 2, ramp + 1], 1), None, conv, True)
    full, ssm = scan(x, dt, -np.exp(ramp * np.ones((N, 1))), B, C, ramp, x + 1, ramp, ssm)
    bare, _ = scan(x, dt, -np.ones((N, D)), B, C, past=ssm * 0, dt_min=0.1, dt_max=1.0)
    turns = (position[:, None, None] + np.arange(tokens)[:, None]) * (FREQUENCY / rotary.TURN)
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    turned, paired = (standard.rotary(q, cos, sin, H, interleaved) for interleaved in (False, True))
    kept, kv = retain(q, q + 1, q - 1, -np.linspace(0.1, 1.0, H), kv, H, 0.5)
    o, key, value = standard.cached_attention(turned, k, k + 1, key, value, position, H, HK, E**-0.5)
    normed = standard.rms_norm(x, ramp, 1e-5)
    plain = standard.rms_norm(q.reshape(1, tokens, H, E), None, 1e-5).reshape(q.shape)
    gated = standard.silu(x[..., 3:9]) * x[..., :6]
    return [convolved, full, bare, paired, kept, o, normed, plain, gated, conv, ssm, kv, key, value]


@pytest.mark.parametrize("flavour", ["onnx", "ort"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_numpy_equals_pytorch_equals_onnxruntime(flavour: str, tokens: int) -> None:
    declared = signature(tokens)
    graph = trace(EveryOperator(), declared, flavour)
    tidy(graph, declared)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    rng = np.random.default_rng(tokens)
    names = [spec.name for spec in declared.outputs] + [f"present.{slot.name}" for slot in declared.state]
    for position in (0, 3, ROWS - tokens):
        feeds: dict[str, np.ndarray] = {}
        for spec in declared.inputs:
            feeds[spec.name] = rng.standard_normal(spec.shape).astype(np.float32)
        feeds["position"] = np.array([position])
        for slot in declared.state:
            feeds[f"past.{slot.name}"] = rng.standard_normal(slot.shape).astype(np.float32)
        with torch.no_grad():
            by_torch = EveryOperator().advance(*map(torch.from_numpy, feeds.values()))
        for name, wanted, torchs, ours in zip(names, by_numpy(feeds), by_torch, session.run(names, feeds), strict=True):
            limit = tolerance("onnx", "float32", wanted)
            assert np.abs(torchs.numpy() - wanted).max() <= limit, f"torch {name} at {position}"
            assert np.abs(ours - wanted).max() <= limit, f"onnxruntime {name} at {position}"


class Angles(nn.Module):
    def advance(self, position: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return (*rotary.angles(torch.from_numpy(FREQUENCY), position, 1), state + 1.0)


def test_rotary_angles_stay_exact_at_great_depth() -> None:
    """At position 2^28 a float32 angle would be off by whole radians; the graph's integers are not."""
    inputs = (TensorSpec("position", "int64", (1,), "position"),)
    outputs = (TensorSpec("cos", "float32", (1, 1, E // 2)), TensorSpec("sin", "float32", (1, 1, E // 2)))
    declared = StepSignature(1, inputs, outputs, (StateSlot("count", "float32", (1,)),))
    graph = trace(Angles(), declared, "onnx")
    tidy(graph, declared)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    position = 1 << 28
    feeds = {"position": np.array([position]), "past.count": np.zeros(1, np.float32)}
    cos, sin, count = session.run(["cos", "sin", "present.count"], feeds)
    phase = np.array([(position * int(f)) % rotary.TURN for f in FREQUENCY]) * (2 * np.pi / rotary.TURN)
    np.testing.assert_allclose(cos.ravel(), np.cos(phase), atol=1e-6)
    np.testing.assert_allclose(sin.ravel(), np.sin(phase), atol=1e-6)
    assert count == 1.0
