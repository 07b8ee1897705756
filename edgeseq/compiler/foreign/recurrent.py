"""LSTM, GRU and RNN as products and elementwise steps, one per time step of a static sequence.

X [T,B,I], W [D,G*H,I], R [D,G*H,H], Bias [D,2*G*H], H0 and C0 [D,B,H]  ->  Y [T,D,B,H], Y_h [D,B,H], Y_c [D,B,H]
T time, B batch, I input, H hidden, G gates (LSTM 4: i o f c; GRU 3: z r h; RNN 1), D directions (1 or 2).
The input's share of all gates is one product for the whole sequence. Source: ONNX operators LSTM-14, GRU-14, RNN-14.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeseq.errors import CompileError

from .build import Build, constant_of
from .shapes import static_shape

MAX_STEPS = 512
Activation = Callable[[ir.Value], ir.Value]


@dataclass
class _Layer:
    """One node read: sizes, activations per direction, the tensors of one direction at a time."""

    node: ir.Node
    build: Build
    label: str
    gates: int

    def __post_init__(self) -> None:
        node = self.node
        self.kind = node.op_type
        self.batch_first = bool(self._attribute("layout", 0))
        x = self._input(0)
        assert x is not None
        shape = static_shape(x)
        if shape is None:
            raise self.refuse("the shape of its input is not static", "give more of --shape, --dim and --value")
        if self.batch_first:
            x, shape = self.build.op("Transpose", x, perm=[1, 0, 2]), (shape[1], shape[0], shape[2])
        self.x, (self.T, self.B, self.I) = x, shape
        if self.T > MAX_STEPS:
            raise self.refuse(f"{self.T} time steps are too many to unroll", f"give it at most {MAX_STEPS} a call")
        lengths = constant_of(self._input(4))
        if self._input(4) is not None and (lengths is None or any(int(n) != self.T for n in lengths)):
            raise self.refuse("sequence_lens differ from the length of its input")
        self.directions = 2 if self._attribute("direction", "forward") == "bidirectional" else 1
        weight = self._input(1)
        shape = static_shape(weight) if weight is not None else None
        if shape is None or len(shape) != 3 or shape[0] != self.directions or shape[1] % self.gates:
            raise self.refuse("the shape of its weights is not [directions, gates * hidden, input]")
        self.H = shape[1] // self.gates

    def refuse(self, why: str, hint: str = "") -> CompileError:
        return CompileError(f"{self.label}: {self.kind} {self.node.name or self.node.outputs[0].name}: {why}", hint)

    def _attribute(self, name: str, default: Any) -> Any:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def _input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def wants(self, output: int) -> bool:
        """Whether anybody reads the output."""
        if output >= len(self.node.outputs):
            return False
        value = self.node.outputs[output]
        return bool(value.uses()) or value.is_graph_output()

    def of_direction(self, index: int, d: int) -> ir.Value | None:
        """Input `index` without its axis of directions: a constant of its own, or a computed slice."""
        value = self._input(index)
        if value is None:
            return None
        known = constant_of(value)
        if known is not None:
            return self.build.const(known[d], known.dtype)
        if self.batch_first and index in (5, 6):
            return self.build.op("Gather", value, self.build.const(d), axis=1)
        return self.build.op("Gather", value, self.build.const(d), axis=0)

    def gate_rows(self, weight: ir.Value, begin: int, end: int) -> ir.Value:
        """Gates begin <= g < end of W [G*H, .], R [G*H, .] or a bias [G*H]."""
        known = constant_of(weight)
        if known is not None:
            return self.build.const(known[begin * self.H : end * self.H], known.dtype)
        bounds = (self.build.const([begin * self.H]), self.build.const([end * self.H]), self.build.const([0]))
        return self.build.op("Slice", weight, *bounds)

    def biases(self, d: int) -> tuple[ir.Value, ir.Value]:
        """Wb and Rb [G*H]."""
        bias = self.of_direction(3, d)
        if bias is None:
            zeros = self.build.const(np.zeros(self.gates * self.H, self.numpy_dtype), self.numpy_dtype)
            return zeros, zeros
        return self.gate_rows(bias, 0, self.gates), self.gate_rows(bias, self.gates, 2 * self.gates)

    @property
    def numpy_dtype(self) -> Any:
        return np.dtype(self.x.dtype.numpy()) if self.x.dtype is not None else np.dtype(np.float32)

    def initial(self, index: int, d: int) -> ir.Value:
        """H0 or C0 [B,H]."""
        value = self.of_direction(index, d)
        return (
            value
            if value is not None
            else self.build.const(np.zeros((self.B, self.H), self.numpy_dtype), self.numpy_dtype)
        )

    def linear(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """x [..,K] weight [M,K] -> [..,M]"""
        y = self.build.op("MatMul", x, self.build.op("Transpose", weight, perm=[1, 0]))
        return y if bias is None else self.build.op("Add", y, bias)

    def times(self, d: int) -> list[int]:
        """Time steps in the order in which direction `d` sees them."""
        backwards = d == 1 or self._attribute("direction", "forward") == "reverse"
        return list(range(self.T))[:: -1 if backwards else 1]

    def steps_of(self, x: ir.Value) -> list[ir.Value]:
        """x [T,B,M] as T values [B,M]."""
        zero = self.build.const([0])
        if self.T == 1:
            return [self.build.op("Squeeze", x, zero)]
        return [
            self.build.op("Squeeze", part, zero)
            for part in self.build.ops("Split", self.T, x, axis=0, num_outputs=self.T)
        ]

    def clipped(self, x: ir.Value) -> ir.Value:
        bound = self._attribute("clip", None)
        if bound is None:
            return x
        limits = [self.build.const(sign * float(bound), self.numpy_dtype) for sign in (-1, 1)]
        return self.build.op("Clip", x, *limits)

    def activations(self, d: int, defaults: tuple[str, ...]) -> list[Activation]:
        """The gate functions of direction `d`. They clip their input, but for LSTM's last, which sees the new cell:
        onnxruntime leaves that alone."""
        names = list(self._attribute("activations", None) or defaults * self.directions)
        names = [n.decode() if isinstance(n, bytes) else str(n) for n in names]
        alphas, betas = (list(self._attribute(f"activation_{k}", None) or []) for k in ("alpha", "beta"))
        if len(names) != len(defaults) * self.directions:
            raise self.refuse(f"it names {len(names)} activations, expected {len(defaults) * self.directions}")
        made = []
        for at, name in enumerate(names):
            a, b = _take(name, alphas, 0), _take(name, betas, 1)
            if at // len(defaults) == d:
                made.append(self._activation(name, a, b, clip=at % len(defaults) < 2))
        return made

    def _activation(self, name: str, alpha: float, beta: float, clip: bool) -> Activation:
        b = self.build
        clipped = self.clipped if clip else lambda x: x
        lower = name.lower()

        def number(value: float) -> ir.Value:
            return b.const(value, self.numpy_dtype)

        plain = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu", "softsign": "Softsign", "softplus": "Softplus"}
        if lower in plain:
            return lambda x: b.op(plain[lower], clipped(x))
        with_alpha = {"leakyrelu": "LeakyRelu", "elu": "Elu", "thresholdedrelu": "ThresholdedRelu"}
        if lower in with_alpha:
            return lambda x: b.op(with_alpha[lower], clipped(x), alpha=alpha)
        if lower == "hardsigmoid":
            return lambda x: b.op("HardSigmoid", clipped(x), alpha=alpha, beta=beta)
        if lower == "affine":
            return lambda x: b.op("Add", b.op("Mul", clipped(x), number(alpha)), number(beta))
        if lower == "scaledtanh":
            return lambda x: b.op("Mul", b.op("Tanh", b.op("Mul", clipped(x), number(beta))), number(alpha))
        raise self.refuse(f"its activation {name} is unknown")

    def results(self, rows: list[list[ir.Value]], *lasts: list[ir.Value]) -> list[ir.Value]:
        """Y from rows[d][t] [B,H], then the last states by direction."""
        b = self.build
        first = self._stacked_rows(rows) if self.wants(0) else lasts[0][0]
        ends = []
        for at, parts in enumerate(lasts):
            axis = 1 if self.batch_first else 0
            if not self.wants(at + 1):
                ends.append(parts[0])
                continue
            wide = [b.op("Unsqueeze", p, b.const([axis])) for p in parts]
            ends.append(wide[0] if len(wide) == 1 else b.op("Concat", *wide, axis=axis))
        return [first, *ends][: len(self.node.outputs)]

    def _stacked_rows(self, rows: list[list[ir.Value]]) -> ir.Value:
        """[T,D,B,H], or [B,T,D,H] when the batch comes first."""
        b = self.build
        wide = []
        for t in range(self.T):
            parts = [b.op("Unsqueeze", rows[d][t], b.const([0, 1])) for d in range(self.directions)]
            wide.append(parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=1))
        y = wide[0] if len(wide) == 1 else b.op("Concat", *wide, axis=0)
        return b.op("Transpose", y, perm=[2, 0, 1, 3]) if self.batch_first else y


_ALPHA = {"leakyrelu": 0.01, "elu": 1.0, "thresholdedrelu": 1.0, "hardsigmoid": 0.2, "affine": 1.0, "scaledtanh": 1.0}
_BETA = {"hardsigmoid": 0.5, "affine": 0.0, "scaledtanh": 1.0}


def _take(name: str, given: list[float], which: int) -> float:
    """The next alpha or beta of the list, if this activation has one; the lists skip those that have none."""
    table = (_ALPHA, _BETA)[which]
    if name.lower() not in table:
        return 0.0
    return float(given.pop(0)) if given else table[name.lower()]


def lstm(node: ir.Node, build: Build, label: str) -> list[ir.Value]:
    """i, o, f = sigmoid(W x + R h + b [+ P c]);  c' = f c + i tanh(..);  h' = o tanh(c')"""
    layer = _Layer(node, build, label, 4)
    couple = bool(layer._attribute("input_forget", 0))
    rows: list[list[ir.Value]] = []
    last_h, last_c = [], []
    for d in range(layer.directions):
        f, g, k = layer.activations(d, ("Sigmoid", "Tanh", "Tanh"))
        w, r = layer.of_direction(1, d), layer.of_direction(2, d)
        assert w is not None and r is not None
        wb, rb = layer.biases(d)
        peepholes = layer.of_direction(7, d)
        p = [layer.gate_rows(peepholes, i, i + 1) for i in range(3)] if peepholes is not None else None
        xs = layer.steps_of(layer.linear(layer.x, w, build.op("Add", wb, rb)))
        h, c = layer.initial(5, d), layer.initial(6, d)
        made: list[ir.Value] = [h] * layer.T
        for t in layer.times(d):
            gates = build.op("Add", layer.linear(h, r, None), xs[t])
            i, o, fg, cand = build.ops("Split", 4, gates, axis=-1, num_outputs=4)
            if p is not None:
                i, fg = build.op("Add", i, build.op("Mul", p[0], c)), build.op("Add", fg, build.op("Mul", p[2], c))
            i = f(i)
            fg = build.op("Sub", build.const(1.0, layer.numpy_dtype), i) if couple else f(fg)
            c = build.op("Add", build.op("Mul", fg, c), build.op("Mul", i, g(cand)))
            if p is not None:
                o = build.op("Add", o, build.op("Mul", p[1], c))
            h = build.op("Mul", f(o), k(c))
            made[t] = h
        rows.append(made)
        last_h.append(h)
        last_c.append(c)
    return layer.results(rows, last_h, last_c)


def gru(node: ir.Node, build: Build, label: str) -> list[ir.Value]:
    """z, r = sigmoid(W x + R h + b);  h' = (1 - z) n + z h

    n = tanh(W x + b + r (R h + b')) when the reset gate works after the product, else tanh(W x + b + R (r h) + b').
    """
    layer = _Layer(node, build, label, 3)
    reset_after = bool(layer._attribute("linear_before_reset", 0))
    rows: list[list[ir.Value]] = []
    last: list[ir.Value] = []
    one = build.const(1.0, layer.numpy_dtype)
    for d in range(layer.directions):
        f, g = layer.activations(d, ("Sigmoid", "Tanh"))
        w, r = layer.of_direction(1, d), layer.of_direction(2, d)
        assert w is not None and r is not None
        wb, rb = layer.biases(d)
        xs = layer.steps_of(layer.linear(layer.x, w, wb))
        h = layer.initial(5, d)
        made: list[ir.Value] = [h] * layer.T
        r_zr, b_zr = layer.gate_rows(r, 0, 2), layer.gate_rows(rb, 0, 2)
        r_n, b_n = layer.gate_rows(r, 2, 3), layer.gate_rows(rb, 2, 3)
        for t in layer.times(d):
            xz, xr, xn = build.ops("Split", 3, xs[t], axis=-1, num_outputs=3)
            if reset_after:
                hz, hr, hn = build.ops("Split", 3, layer.linear(h, r, rb), axis=-1, num_outputs=3)
                z, reset = f(build.op("Add", xz, hz)), f(build.op("Add", xr, hr))
                n = g(build.op("Add", xn, build.op("Mul", reset, hn)))
            else:
                hz, hr = build.ops("Split", 2, layer.linear(h, r_zr, b_zr), axis=-1, num_outputs=2)
                z, reset = f(build.op("Add", xz, hz)), f(build.op("Add", xr, hr))
                n = g(build.op("Add", xn, layer.linear(build.op("Mul", reset, h), r_n, b_n)))
            h = build.op("Add", build.op("Mul", build.op("Sub", one, z), n), build.op("Mul", z, h))
            made[t] = h
        rows.append(made)
        last.append(h)
    return layer.results(rows, last)


def rnn(node: ir.Node, build: Build, label: str) -> list[ir.Value]:
    """h' = tanh(W x + R h + b)"""
    layer = _Layer(node, build, label, 1)
    rows: list[list[ir.Value]] = []
    last: list[ir.Value] = []
    for d in range(layer.directions):
        (f,) = layer.activations(d, ("Tanh",))
        w, r = layer.of_direction(1, d), layer.of_direction(2, d)
        assert w is not None and r is not None
        wb, rb = layer.biases(d)
        xs = layer.steps_of(layer.linear(layer.x, w, build.op("Add", wb, rb)))
        h = layer.initial(5, d)
        made: list[ir.Value] = [h] * layer.T
        for t in layer.times(d):
            h = f(build.op("Add", layer.linear(h, r, None), xs[t]))
            made[t] = h
        rows.append(made)
        last.append(h)
    return layer.results(rows, last)
