"""Small stateful ONNX graphs of operators that no rule knows, written by hand, and a seeded generator of more."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from .machine import model_of, port

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


class Builder:
    """Collects nodes; `op` returns the name of its output."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray] = {}
        self.rng = np.random.default_rng(seed)

    def op(self, kind: str, *inputs: str, out: str = "", domain: str = "", **attrs: Any) -> str:
        out = out or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], domain=domain, **attrs))
        return out

    def const(self, value: Any, dtype: str = "int64") -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype)
        return name

    def weight(self, *shape: int) -> str:
        return self.const(self.rng.standard_normal(shape), "float32")


Case = tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto], Callable[[Builder], None]]
X, Y = port("x", [1, 3, 10]), port("y", [1, 3, 10])
S, S2 = port("past.s", [1, 3, 10]), port("present.s", [1, 3, 10])
I, J = port("i", [1, 5], "int64"), port("j", [1, 5], "int64")
N, N2 = port("past.n", [1], "int64"), port("present.n", [1], "int64")


def elementwise(b: Builder) -> None:
    x = b.op("Mul", "x", b.const(0.7, "float32"))
    for kind in ("Tanh", "Exp", "Sigmoid", "Erf", "Softplus", "Sqrt", "Log", "Sin", "Cos", "Abs", "Neg", "Relu"):
        x = (
            b.op("Add", b.op(kind, x), "past.s")
            if kind in ("Erf", "Neg")
            else b.op(kind, b.op("Abs", x) if kind in ("Sqrt", "Log") else x)
        )
        x = b.op("Add", x, b.const(0.25, "float32"))
    b.op("Clip", x, b.const(-2, "float32"), b.const(2, "float32"), out="present.s")
    b.op("Div", x, b.op("Add", b.op("Mul", "x", "x"), b.const(1, "float32")), out="y")


def activations(b: Builder) -> None:
    x = "x"
    for kind, attrs in (
        ("Elu", {"alpha": 0.7}), ("LeakyRelu", {"alpha": 0.1}), ("HardSigmoid", {}), ("Gelu", {}), ("Selu", {}),
        ("Softsign", {}), ("HardSwish", {}), ("Mish", {}), ("Floor", {}), ("Reciprocal", {}),
    ):  # fmt: skip
        x = b.op("Add", b.op(kind, x, **attrs), "past.s" if kind == "Mish" else b.const(0.3, "float32"))
    b.op("Identity", x, out="y")
    b.op("Sign", x, out="present.s")


def powers(b: Builder) -> None:
    base = b.op("Add", b.op("Abs", "x"), b.const(0.5, "float32"))
    p = b.op("Pow", base, b.const(1.7, "float32"))
    q = b.op("Pow", "x", b.const(2.0, "float32"))
    r = b.op("Round", b.op("Mul", "x", b.const(3.0, "float32")))
    b.op("Sum", p, q, r, b.op("Atan", "x"), b.op("Sinh", "x"), b.op("Ceil", "x"), out="y")
    b.op("Max", b.op("Min", "past.s", "x"), b.op("Neg", q), out="present.s")


def softmaxes(b: Builder) -> None:
    last = b.op("Softmax", b.op("Add", "x", "past.s"), axis=-1)
    middle = b.op("Softmax", last, axis=1)
    b.op("LogSoftmax", middle, axis=-1, out="y")
    b.op("Sub", last, middle, out="present.s")


def masked_softmax(b: Builder) -> None:
    mask = b.op("Less", "x", b.const(-1.0, "float32"))
    minus = b.op("Where", mask, b.const(-np.inf, "float32"), "x")
    b.op("Softmax", minus, axis=-1, out="y")
    b.op("Add", "past.s", "y", out="present.s")


def layernorm_from_primitives(b: Builder) -> None:
    x = b.op("Add", "x", "past.s")
    mean = b.op("ReduceMean", x, b.const([-1]), keepdims=1)
    centred = b.op("Sub", x, mean)
    var = b.op("ReduceMean", b.op("Mul", centred, centred), b.const([-1]), keepdims=1)
    y = b.op("Div", centred, b.op("Sqrt", b.op("Add", var, b.const(1e-5, "float32"))))
    b.op("Add", b.op("Mul", y, b.weight(10)), b.weight(10), out="y")
    b.op("Mul", y, b.const(0.5, "float32"), out="present.s")


def norms(b: Builder) -> None:
    y = b.op("LayerNormalization", "x", b.weight(10), b.weight(10), axis=-1)
    y = b.op("RMSNormalization", y, b.weight(3, 10), axis=1)
    b.op("Add", y, "past.s", out="y")
    b.op("Mul", y, b.const(0.3, "float32"), out="present.s")


def reductions(b: Builder) -> None:
    total = b.op("ReduceSum", "x", b.const([1, 2]), keepdims=1)
    parts = [total]
    for kind, axes in (
        ("ReduceMax", [1]),
        ("ReduceMin", [2]),
        ("ReduceL2", [2]),
        ("ReduceProd", [1]),
        ("ReduceMean", [0]),
    ):
        parts.append(b.op(kind, "x", b.const(axes), keepdims=1))
    whole = b.op("ReduceLogSumExp", "x", b.const([0, 1, 2]), keepdims=0)
    b.op("Sum", "past.s", *parts, whole, out="y")
    b.op("Sub", "past.s", parts[1], out="present.s")


def arg_reductions(b: Builder) -> None:
    top = b.op("ArgMax", "x", axis=2, keepdims=0)
    low = b.op("ArgMin", "past.s", axis=2, keepdims=0)
    picked = b.op(
        "GatherElements",
        "x",
        b.op("Unsqueeze", b.op("Mod", b.op("Add", top, low), b.const(10), fmod=0), b.const([2])),
        axis=2,
    )
    b.op("Mul", picked, "x", out="y")
    b.op("Sub", "past.s", picked, out="present.s")


def concat_and_slices(b: Builder) -> None:
    both = b.op("Concat", "past.s", "x", axis=2)
    even = b.op("Slice", both, b.const([0]), b.const([20]), b.const([2]), b.const([2]))
    back = b.op("Slice", both, b.const([-1]), b.const([-100]), b.const([2]), b.const([-2]))
    window = b.op("Slice", both, b.const([5, 0]), b.const([15, 3]), b.const([2, 1]))
    b.op("Sum", even, back, window, out="y")
    b.op("Slice", both, b.const([7]), b.const([17]), b.const([2]), out="present.s")


def shift_register(b: Builder) -> None:
    """The newest row comes last, the oldest falls out; y reads the old rows."""
    row = b.op("Slice", "x", b.const([0]), b.const([1]), b.const([1]))
    kept = b.op("Slice", "past.s", b.const([1]), b.const([3]), b.const([1]))
    b.op("Concat", kept, row, axis=1, out="present.s")
    b.op("Add", b.op("Slice", "past.s", b.const([0]), b.const([1]), b.const([1])), "x", out="y")


def transposes(b: Builder) -> None:
    t = b.op("Transpose", "x", perm=[0, 2, 1])
    s = b.op("Transpose", "past.s", perm=[2, 0, 1])
    m = b.op("Add", b.op("Reshape", t, b.const([10, 1, 3])), s)
    b.op("Transpose", b.op("Tanh", m), perm=[1, 2, 0], out="y")
    b.op("Reshape", t, b.const([1, 3, 10]), out="present.s")


def expands(b: Builder) -> None:
    column = b.op("Slice", "x", b.const([4]), b.const([5]), b.const([2]))
    wide = b.op("Expand", column, b.const([1, 3, 10]))
    tiled = b.op("Tile", b.op("Slice", "past.s", b.const([0]), b.const([5]), b.const([2])), b.const([1, 1, 2]))
    padded = b.op("Pad", b.op("Slice", "x", b.const([0]), b.const([8]), b.const([2])), b.const([0, 0, 1, 0, 0, 1]))
    b.op("Sum", wide, tiled, padded, out="y")
    b.op("Sub", wide, padded, out="present.s")


def logic(b: Builder) -> None:
    more = b.op("Greater", "x", "past.s")
    same = b.op("Equal", b.op("Cast", "x", to=INT64), b.op("Cast", "past.s", to=INT64))
    some = b.op("Or", b.op("And", more, b.op("Not", same)), b.op("LessOrEqual", "x", b.const(-0.5, "float32")))
    b.op("Where", some, "x", "past.s", out="present.s")
    b.op("Cast", b.op("Xor", some, more), to=FLOAT, out="y")


def integers(b: Builder) -> None:
    odd = b.op("Mod", b.op("Add", "i", "past.n"), b.const(7), fmod=0)
    q = b.op("Div", b.op("Mul", odd, b.const([[3, -5, 7, 11, 2**40]])), b.const(3))
    b.op("Sub", b.op("Max", q, b.op("Neg", "i")), b.op("Abs", "i"), out="j")
    b.op("Add", "past.n", b.op("ReduceSum", "i", b.const([0, 1]), keepdims=0), out="present.n")


def computed_gather(b: Builder) -> None:
    """Rows of a weight and of the state, picked by indices that the graph computes."""
    index = b.op("Mod", b.op("Add", "i", "past.n"), b.const(3), fmod=0)
    rows = b.op("Gather", b.op("Squeeze", "past.s", b.const([0])), index, axis=0)
    table = b.op("Gather", b.op("Mul", b.weight(3, 10), b.const(2.0, "float32")), index, axis=0)
    first = b.op("Gather", b.op("Add", rows, table), b.const(2), axis=1)
    b.op("Expand", b.op("Unsqueeze", first, b.const([1])), b.const([1, 3, 10]), out="y")
    b.op("Add", "past.s", b.op("Gather", "x", b.op("Mod", "past.n", b.const(3), fmod=0), axis=1), out="present.s")
    b.op("Add", "past.n", b.const([1]), out="present.n")


def scatter_at_position(b: Builder) -> None:
    """A row of the state written at a computed place, the rest kept."""
    at = b.op("Mod", "past.n", b.const(3), fmod=0)
    row = b.op("Slice", "x", b.const([1]), b.const([2]), b.const([1]))
    index = b.op("Expand", b.op("Reshape", at, b.const([1, 1, 1])), b.const([1, 1, 10]))
    b.op("ScatterElements", "past.s", index, row, axis=1, out="present.s")
    b.op("Add", "present.s", "past.s", out="y")
    b.op("Add", "past.n", b.const([1]), out="present.n")


def casts(b: Builder) -> None:
    whole = b.op("Cast", b.op("Mul", "x", b.const(3.0, "float32")), to=INT64)
    small = b.op("Cast", whole, to=TensorProto.INT32)
    truth = b.op("Cast", whole, to=BOOL)
    b.op("Add", b.op("Cast", small, to=FLOAT), b.op("Cast", truth, to=FLOAT), out="y")
    b.op("Cast", b.op("Add", b.op("Cast", "past.s", to=INT64), whole), to=FLOAT, out="present.s")


def matmuls(b: Builder) -> None:
    """Products without a weight: between activations, batched, with a state."""
    scores = b.op("MatMul", "x", b.op("Transpose", "past.s", perm=[0, 2, 1]))
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), "x")
    outer = b.op("Einsum", "x", mixed, equation="btd,bte->bde")
    b.op("MatMul", "x", b.op("Mul", outer, b.const(0.1, "float32")), out="y")
    b.op("Tanh", mixed, out="present.s")


def linear_between(b: Builder) -> None:
    """A rule's kernel in the midst of generic ones; odd bias and residual shapes."""
    h = b.op("MatMul", b.op("Tanh", "x"), b.weight(10, 21))
    h = b.op("Add", h, b.weight(21))
    one, two = (
        b.op("Slice", h, b.const([0]), b.const([10]), b.const([2])),
        b.op("Slice", h, b.const([11]), b.const([21]), b.const([2])),
    )
    y = b.op("MatMul", b.op("Mul", one, b.op("Sigmoid", two)), b.op("Transpose", b.weight(10, 10), perm=[1, 0]))
    b.op("Add", y, "past.s", out="y")
    b.op("Add", b.op("MatMul", two, b.weight(10, 10)), b.op("Add", "x", "past.s"), out="present.s")


def gemms(b: Builder) -> None:
    flat = b.op("Reshape", "x", b.const([3, 10]))
    g = b.op("Gemm", flat, b.weight(10, 7), b.weight(7), alpha=0.5, beta=2.0)
    h = b.op("Gemm", g, b.weight(10, 7), b.weight(3, 1), transB=1)
    b.op("Reshape", h, b.const([1, 3, 10]), out="y")
    b.op("Add", b.op("Reshape", h, b.const([1, 3, 10])), "past.s", out="present.s")


def convolution(b: Builder) -> None:
    wide = b.op("Concat", "past.s", "x", axis=2)
    y = b.op("Conv", wide, b.weight(3, 1, 4), b.weight(3), group=3, pads=[0, 0])
    b.op("Slice", y, b.const([7]), b.const([17]), b.const([2]), out="y")
    b.op("Slice", wide, b.const([10]), b.const([20]), b.const([2]), out="present.s")


def split_parts(b: Builder) -> None:
    b.nodes.append(helper.make_node("Split", ["x", b.const([3, 6, 1])], ["p", "q", "r"], axis=2))
    b.op("Concat", "r", b.op("Mul", "q", "r"), "p", axis=2, out="y")
    b.op("Concat", "q", b.op("Slice", "past.s", b.const([0]), b.const([4]), b.const([2])), axis=2, out="present.s")


def copies_only(b: Builder) -> None:
    """Nothing is computed: the input becomes the state, the old state the output."""
    b.op("Identity", "past.s", out="y")
    b.op("Identity", "x", out="present.s")


def constant_output(b: Builder) -> None:
    b.op("Identity", b.weight(1, 3, 10), out="y")
    b.op("Add", "past.s", "x", out="present.s")


def same_twice(b: Builder) -> None:
    """One value leaves as output and as state."""
    t = b.op("Tanh", b.op("Add", "x", "past.s"))
    b.op("Identity", t, out="y")
    b.op("Identity", t, out="present.s")


def scalars(b: Builder) -> None:
    mean = b.op("ReduceMean", "x", b.const([0, 1, 2]), keepdims=0)
    count = b.op("Cast", b.op("Squeeze", "past.n", b.const([0])), to=FLOAT)
    b.op("Mul", "x", b.op("Add", mean, count), out="y")
    b.op("Add", "past.n", b.const([2]), out="present.n")


CASES: dict[str, Case] = {
    f.__name__: ([X, S], [Y, S2], f)
    for f in (
        elementwise, activations, powers, softmaxes, masked_softmax, layernorm_from_primitives, norms, reductions,
        arg_reductions, concat_and_slices, shift_register, transposes, expands, logic, casts, matmuls, linear_between,
        gemms, convolution, split_parts, copies_only, constant_output, same_twice,
    )
}  # fmt: skip
CASES["integers"] = ([I, N], [J, N2], integers)
CASES["computed_gather"] = ([X, I, S, N], [Y, S2, N2], computed_gather)
CASES["scatter_at_position"] = ([X, S, N], [Y, S2, N2], scatter_at_position)
CASES["scalars"] = ([X, N], [Y, N2], scalars)


def by_hand(name: str) -> onnx.ModelProto:
    inputs, outputs, write = CASES[name]
    b = Builder(zlib.crc32(name.encode()))
    write(b)
    return model_of(b.nodes, inputs, outputs, b.weights)


def large(b: Builder) -> None:
    """Intermediates of megabytes between reductions, far more than a thread's stack."""
    wide = b.op(
        "MatMul",
        b.op("Transpose", "x", perm=[0, 2, 1]),
        b.const(np.linspace(-1, 1, 3 * 70001).reshape(3, 70001), "float32"),
    )
    soft = b.op("Softmax", wide, axis=1)
    low = b.op("Sub", soft, b.op("ReduceMean", b.op("Tanh", wide), b.const([1]), keepdims=1))
    peak = b.op("ReduceMax", low, b.const([2]), keepdims=1)
    b.op("Expand", b.op("Transpose", peak, perm=[0, 2, 1]), b.const([1, 3, 10]), out="y")
    b.op("Add", "past.s", "x", out="present.s")


CASES["large"] = ([X, S], [Y, S2], large)


def negative_gather(b: Builder) -> None:
    """Indices that count from the end."""
    back = b.op("Sub", b.op("Mod", "i", b.const(3), fmod=0), b.const(3))
    rows = b.op("Gather", b.op("Tanh", "x"), b.op("Squeeze", back, b.const([0])), axis=1)
    b.op("Slice", rows, b.const([1]), b.const([4]), b.const([1]), out="y")
    b.op("Add", "past.s", "x", out="present.s")


CASES["negative_gather"] = ([X, I, S], [Y, S2], negative_gather)


A, A2 = port("past.a", [1, 3, 10]), port("present.a", [1, 3, 10])


def swapped_states(b: Builder) -> None:
    """Two slots trade places, so neither may be overwritten before both were read."""
    b.op("Identity", "past.a", out="present.s")
    b.op("Reshape", "past.s", b.const([1, 3, 10]), out="present.a")
    b.op("Add", "x", "past.s", out="y")


def state_then_output(b: Builder) -> None:
    """The new state is the input itself; the output is the old state, listed behind it."""
    b.op("Identity", "x", out="present.s")
    b.op("Identity", "past.s", out="y")


def delay_line(b: Builder) -> None:
    """Each slot takes what the one before held."""
    b.op("Identity", "x", out="present.s")
    b.op("Identity", "past.s", out="present.a")
    b.op("Tanh", "past.a", out="y")


def read_after_update(b: Builder) -> None:
    """The new state feeds on, the old one is read last."""
    b.op("Add", "past.s", "x", out="present.s")
    h = b.op("MatMul", "present.s", b.weight(10, 10))
    b.op("Add", h, b.op("Reshape", "past.s", b.const([1, 3, 10])), out="y")


def matmul_of_state(b: Builder) -> None:
    """A rule reads the state that a generic kernel replaces."""
    b.op("Add", b.op("MatMul", "past.s", b.weight(10, 10)), "x", out="present.s")
    b.op("MatMul", b.op("Slice", "past.s", b.const([0]), b.const([10]), b.const([2])), b.weight(10, 10), out="y")


def conv_with_state(b: Builder) -> None:
    """The convolution rule, channels first: past.c is [1,k-1,C], its transposed old value is read elsewhere too."""
    past = b.op("Transpose", "past.s", perm=[0, 2, 1])
    b.nodes.append(
        helper.make_node(
            "CausalConvWithState",
            [b.op("Transpose", "x", perm=[0, 2, 1]), b.weight(10, 1, 4), b.weight(10), past],
            ["conv", "kept"],
            activation="silu",
        )
    )
    b.op("Transpose", "kept", perm=[0, 2, 1], out="present.s")
    b.op("Transpose", "conv", perm=[0, 2, 1], out="y")


def conv_whose_state_is_read(b: Builder) -> None:
    conv_with_state(b)
    b.nodes.pop()
    b.op("Add", b.op("Transpose", "conv", perm=[0, 2, 1]), b.op("Reshape", "past.s", b.const([1, 3, 10])), out="y")


for _f in (swapped_states, delay_line):
    CASES[_f.__name__] = ([X, S, A], [S2, A2, Y], _f)
for _f in (state_then_output, read_after_update, matmul_of_state):
    CASES[_f.__name__] = ([X, S], [S2, Y], _f)
for _f in (conv_with_state, conv_whose_state_is_read):
    CASES[_f.__name__] = ([X, S], [Y, S2], _f)


def strided_output(b: Builder) -> None:
    """A slice of a product leaves as it is, and another becomes the state."""
    h = b.op("MatMul", "x", b.weight(10, 25))
    b.op("Slice", h, b.const([3]), b.const([13]), b.const([2]), out="y")
    b.op("Slice", h, b.const([15]), b.const([25]), b.const([2]), out="present.s")


def strided_for_rule_and_generic(b: Builder) -> None:
    """One slice is read by a product, by TVM's code and by another slice."""
    h = b.op("MatMul", "x", b.weight(10, 25))
    part = b.op("Slice", h, b.const([3]), b.const([13]), b.const([2]))
    p = b.op("MatMul", part, b.weight(10, 10))
    q = b.op("Tanh", part)
    r = b.op("Slice", part, b.const([2]), b.const([3]), b.const([2]))
    b.op("Sum", p, q, r, out="y")
    b.op(
        "Reshape",
        b.op("MatMul", b.op("Reshape", part, b.const([1, 5, 6])), b.weight(6, 6)),
        b.const([1, 3, 10]),
        out="present.s",
    )


def split_of_rows(b: Builder) -> None:
    """Windows of whole rows, of the middle axis and of a state."""
    h = b.op("MatMul", "x", b.weight(10, 10))
    b.nodes.append(helper.make_node("Split", [h], ["top", "mid", "low"], axis=1, num_outputs=3))
    old = b.op("Slice", "past.s", b.const([1]), b.const([2]), b.const([1]))
    b.op(
        "Concat", b.op("MatMul", "mid", b.weight(10, 10)), "top", b.op("MatMul", old, b.weight(10, 10)), axis=1, out="y"
    )
    b.op("Add", "past.s", "low", out="present.s")


for _f in (strided_output, strided_for_rule_and_generic, split_of_rows):
    CASES[_f.__name__] = ([X, S], [Y, S2], _f)


def at_random(seed: int) -> onnx.ModelProto:
    """A dozen operators drawn one after the other, each reading what is there: input, state or earlier results."""
    b = Builder(seed)
    there = ["x", "past.s"]
    for _ in range(12):
        one, two = (str(n) for n in b.rng.choice(there, 2))
        there.append(b.op("Tanh", _DRAWN[int(b.rng.integers(len(_DRAWN)))](b, one, two)))
    y, s = (str(n) for n in b.rng.choice(there[-4:], 2, replace=False))
    b.op("Add", y, there[-1], out="y")
    b.op("Mul", s, b.op("Sigmoid", there[-2]), out="present.s")
    return model_of(b.nodes, [X, S], [Y, S2], b.weights)


def _halves(b: Builder, x: str, y: str) -> str:
    b.nodes.append(helper.make_node("Split", [x, b.const([4, 6])], [f"l{len(b.nodes)}", f"r{len(b.nodes)}"], axis=2))
    left, right = b.nodes[-1].output
    return (
        b.op("Concat", right, b.op("Slice", y, b.const([5]), b.const([9]), b.const([2])), axis=2)
        if len(b.nodes) % 2
        else b.op("Concat", right, left, axis=2)
    )


def _normal(b: Builder, x: str, y: str) -> str:
    centred = b.op("Sub", x, b.op("ReduceMean", x, b.const([2]), keepdims=1))
    return b.op(
        "Div",
        centred,
        b.op(
            "Sqrt",
            b.op("Add", b.op("ReduceMean", b.op("Mul", y, y), b.const([1, 2]), keepdims=1), b.const(0.1, "float32")),
        ),
    )


def _mixed(b: Builder, x: str, y: str) -> str:
    scores = b.op("Softmax", b.op("MatMul", x, b.op("Transpose", y, perm=[0, 2, 1])), axis=-1)
    return b.op("MatMul", scores, y)


def _rows(b: Builder, x: str, y: str) -> str:
    top = b.op("Slice", x, b.const([2]), b.const([-9]), b.const([1]), b.const([-1]))
    return b.op(
        "Mul", top, b.op("Expand", b.op("Slice", y, b.const([1]), b.const([2]), b.const([1])), b.const([1, 3, 10]))
    )


def _part_of_product(b: Builder, x: str, y: str) -> str:
    wide = b.op("MatMul", x, b.weight(10, 17))
    return b.op("Max", b.op("Slice", wide, b.const([7]), b.const([17]), b.const([2])), y)


def _turned(b: Builder, x: str, y: str) -> str:
    t = b.op("Transpose", b.op("Reshape", x, b.const([3, 2, 5])), perm=[2, 0, 1])
    return b.op("Add", b.op("Reshape", t, b.const([1, 3, 10])), y)


_DRAWN: list[Callable[[Builder, str, str], str]] = [
    lambda b, x, y: b.op("Add", x, y),
    lambda b, x, y: b.op("Mul", x, b.op("Sigmoid", y)),
    lambda b, x, y: b.op("Add", b.op("MatMul", x, b.weight(10, 10)), y),
    lambda b, x, y: b.op("Where", b.op("Greater", x, y), b.op("Exp", b.op("Neg", b.op("Abs", x))), y),
    lambda b, x, y: b.op("LayerNormalization", b.op("Add", x, y), b.weight(10), b.weight(10), axis=-1),
    _halves, _normal, _mixed, _rows, _turned, _part_of_product,
]  # fmt: skip
