"""torch.nn's LSTM, GRU and RNN as products and elementwise steps, one round per token of a static length.

torch.onnx writes ONNX's own nodes with shapes that it computes, and those have their weights in another order and
stacked: no pass would find a matrix of the state_dict in them.

x [B,T,I] or [T,B,I], states [layers*directions,B,H], weights [gates*H,I] and [gates*H,H]. Gates in torch's order.
Source: the formulas of torch.nn.LSTM, GRU and RNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from exporters.translate import Translation, Value, ints, linear, onnx_op, static_shape

Cell = Callable[..., list[Value]]
"""cell(gates of the input, states, the product of h with its weights, weight of the projection or None) -> states."""


def translations() -> Translation:
    aten = torch.ops.aten
    return {
        aten.lstm.input: lstm,
        aten.gru.input: partial(_one_state, gru_cell),
        aten.rnn_tanh.input: partial(_one_state, partial(rnn_cell, onnx_op.Tanh)),
        aten.rnn_relu.input: partial(_one_state, partial(rnn_cell, onnx_op.Relu)),
    }


def lstm(
    x: Value, hx: Sequence[Value], params: Sequence[Value], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Value, ...]:  # fmt: skip
    """y, h, c of torch.nn.LSTM; with a projection h is narrower than c."""
    return _run(lstm_cell, x, hx, params, has_biases, num_layers, bidirectional, batch_first)


def _one_state(
    cell: Cell, x: Value, hx: Value, params: Sequence[Value], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Value, ...]:  # fmt: skip
    return _run(cell, x, [hx], params, has_biases, num_layers, bidirectional, batch_first)


def lstm_cell(gates: Value, states: list[Value], product: Value, projection: Value | None) -> list[Value]:
    """i, f, g, o = gates;  c = f c + i g;  h = o tanh(c), then projected."""
    i, f, g, o = _split(onnx_op.Add(gates, product), 4)
    kept = onnx_op.Mul(onnx_op.Sigmoid(f), states[1])
    c = onnx_op.Add(kept, onnx_op.Mul(onnx_op.Sigmoid(i), onnx_op.Tanh(g)))
    h = onnx_op.Mul(onnx_op.Sigmoid(o), onnx_op.Tanh(c))
    return [h if projection is None else linear(h, projection), c]


def gru_cell(gates: Value, states: list[Value], product: Value, projection: Value | None) -> list[Value]:
    """r, z = gates;  n = tanh(x's n + r (h's n));  h = n + z (h - n)."""
    (r, z, n), (hr, hz, hn) = _split(gates, 3), _split(product, 3)
    r, z = (onnx_op.Sigmoid(onnx_op.Add(a, b)) for a, b in ((r, hr), (z, hz)))
    n = onnx_op.Tanh(onnx_op.Add(n, onnx_op.Mul(r, hn)))
    return [onnx_op.Add(n, onnx_op.Mul(z, onnx_op.Sub(states[0], n)))]


def rnn_cell(
    activation: Callable[[Value], Value], gates: Value, states: list[Value], product: Value, projection: Value | None
) -> list[Value]:
    """h = tanh or relu of the sum."""
    return [activation(onnx_op.Add(gates, product))]


def _run(
    cell: Cell, x: Value, hx: Sequence[Value], params: Sequence[Value], has_biases: bool,
    num_layers: int, bidirectional: bool, batch_first: bool,
) -> tuple[Value, ...]:  # fmt: skip
    """(y, *states): every layer and direction in torch's order, each from its row of the states."""
    directions, time = 2 if bidirectional else 1, 1 if batch_first else 0
    tokens = static_shape(x)[time]
    each = len(params) // (num_layers * directions)
    finals: list[list[Any]] = [[] for _ in hx]
    for layer in range(num_layers):
        results = []
        for direction in range(directions):
            index = layer * directions + direction
            states = [_at(state, index, 0, num_layers * directions) for state in hx]
            weights = list(params[index * each : (index + 1) * each])
            order = range(tokens) if direction == 0 else range(tokens - 1, -1, -1)
            y, states = _direction(cell, x, states, weights, has_biases, time, order)
            results.append(y)
            for final, state in zip(finals, states, strict=True):
                final.append(onnx_op.Unsqueeze(state, ints([0])))
        x = _joined(results, -1)
    return (x, *(_joined(final, 0) for final in finals))


def _direction(
    cell: Cell, x: Value, states: list[Value], weights: list[Value], has_biases: bool, time: int, order: range
) -> tuple[Value, list[Value]]:
    """One layer in one direction; the input's share of all gates is one product for all tokens."""
    w_x, w_h, *rest = weights
    b_x, b_h = (rest.pop(0), rest.pop(0)) if has_biases else (None, None)
    projection = rest.pop() if rest else None
    gates = linear(x, w_x, b_x)
    found = {}
    for t in order:
        own = _at(gates, t, time, len(order))
        states = cell(own, states, linear(states[0], w_h, b_h), projection)
        found[t] = onnx_op.Unsqueeze(states[0], ints([time]))
    return _joined([found[t] for t in sorted(found)], time), states


def _at(x: Value, index: int, axis: int, size: int) -> Value:
    """Row `index` of an axis of `size`, without that axis."""
    row = x if size == 1 else onnx_op.Slice(x, ints([index]), ints([index + 1]), ints([axis]))
    return onnx_op.Squeeze(row, ints([axis]))


def _split(x: Value, parts: int) -> Sequence[Value]:
    """Equal parts of the last axis."""
    result: Sequence[Value] = onnx_op.Split(x, axis=-1, num_outputs=parts, _outputs=parts)
    return result


def _joined(parts: list[Value], axis: int) -> Value:
    return parts[0] if len(parts) == 1 else onnx_op.Concat(*parts, axis=axis)
