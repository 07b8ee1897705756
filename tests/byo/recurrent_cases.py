"""LSTM, GRU and RNN nodes in every form that the standard has and onnxruntime runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from .support import Theirs, model_of, value

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def layer(
    kind: str, T: int = 1, B: int = 1, I: int = 5, H: int = 7, *, bias: bool = True, peepholes: bool = False,
    lengths: bool = False, scale: float = 0.5, opset: int = 14, computed: bool = False, **attributes: Any,
) -> Theirs:  # fmt: skip
    """One node whose states are the graph's; `computed` weights are no constants for who looks at one node."""
    rng = np.random.default_rng(sum(map(ord, kind)) + T)
    D = 2 if attributes.get("direction") == "bidirectional" else 1
    first = bool(attributes.get("layout", 0))
    G = GATES[kind]
    weights = {
        "W": rng.standard_normal((D, G * H, I)),
        "R": rng.standard_normal((D, G * H, H)),
        "B": rng.standard_normal((D, 2 * G * H)),
        "P": rng.standard_normal((D, 3 * H)),
    }
    weights = {n: (scale * w).astype(np.float32) for n, w in weights.items()}
    inputs = [value("x", [B, T, I] if first else [T, B, I])]
    outputs = [value("y", [B, T, D, H] if first else [T, D, B, H])]
    state_shape = [B, D, H] if first else [D, B, H]
    names = ["h", "c"] if kind == "LSTM" else ["h"]
    for name in names:
        inputs.append(value(name, state_shape))
        outputs.append(value(f"{name}n", state_shape))
    fed = ["x", "W", "R", "B" if bias else "", "", *names]
    if lengths:
        fed[4] = "lengths"
        weights["lengths"] = np.full(B, T, np.int32)
    if peepholes:
        fed.append("P")
    while not fed[-1]:
        fed.pop()
    if not bias:
        del weights["B"]
    if not peepholes:
        del weights["P"]
    nodes = []
    if computed:
        inputs.append(value("gain", []))
        nodes.append(helper.make_node("Mul", ["R", "gain"], ["R2"]))
        fed[2] = "R2"
    node: onnx.NodeProto = helper.make_node(kind, fed, ["y", *(f"{n}n" for n in names)], hidden_size=H, **attributes)
    model = model_of([*nodes, node], inputs, outputs, weights, opset)
    return Theirs(model, ",".join(f"{n}:{n}n" for n in names))


CASES: dict[str, Theirs] = {
    "lstm": layer("LSTM"),
    "lstm-4-steps": layer("LSTM", T=4),
    "lstm-batch": layer("LSTM", T=3, B=2),
    "lstm-no-bias": layer("LSTM", T=2, bias=False),
    "lstm-peepholes": layer("LSTM", T=2, peepholes=True),
    "lstm-coupled": layer("LSTM", T=2, input_forget=1),
    "lstm-clip": layer("LSTM", T=3, clip=0.4, scale=1.5),
    "lstm-reverse": layer("LSTM", T=4, direction="reverse"),
    "lstm-both-ways": layer("LSTM", T=4, B=2, direction="bidirectional", peepholes=True),
    "lstm-lengths": layer("LSTM", T=3, lengths=True),
    "lstm-activations": layer("LSTM", T=2, activations=["HardSigmoid", "Softsign", "Relu"], activation_alpha=[0.3]),
    "lstm-activations-both": layer(
        "LSTM", T=2, direction="bidirectional",
        activations=["Sigmoid", "Elu", "Tanh", "HardSigmoid", "LeakyRelu", "Affine"],
        activation_alpha=[0.7, 0.3, 0.05, 1.5], activation_beta=[0.4, 0.1],
    ),
    "lstm-opset-7": layer("LSTM", T=2, opset=7),
    "lstm-computed-weights": layer("LSTM", T=2, computed=True),
    "gru": layer("GRU"),
    "gru-reset-after": layer("GRU", T=3, linear_before_reset=1),
    "gru-reset-before": layer("GRU", T=3, B=2),
    "gru-reverse-no-bias": layer("GRU", T=3, bias=False, direction="reverse", linear_before_reset=1),
    "gru-both-ways": layer("GRU", T=3, direction="bidirectional", clip=0.6),
    "gru-activations": layer(
        "GRU", T=2, activations=["HardSigmoid", "ScaledTanh"], activation_alpha=[0.2, 1.7], activation_beta=[0.5, 0.6]
    ),
    "gru-opset-7": layer("GRU", T=2, opset=7, linear_before_reset=1),
    "gru-computed-weights": layer("GRU", T=2, computed=True),
    "rnn": layer("RNN", T=3),
    "rnn-relu-both-ways": layer("RNN", T=3, direction="bidirectional", activations=["Relu", "Softplus"]),
}  # fmt: skip
