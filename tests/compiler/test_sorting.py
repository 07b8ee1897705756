"""TopK, CumSum and CumProd: the kernels against numpy, the rules against onnxruntime, ties and NaN included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeseq.compiler.kernels.cumulative import Cumulative
from edgeseq.compiler.kernels.top_k import TopK
from edgeseq.verify.tolerances import tolerance

from .graphs import Builder
from .library import ON, AnyLibrary, Library, library_on, ref, refs, unset
from .machine import Machine, model_of, onnx_stream, port

SORTS = [
    TopK(1, 512, 1, 512, 512, 512, False, "float32"),
    TopK(3, 37, 1, 5, 37, 41, True, "float32"),
    TopK(2, 7, 6, 4, 3, 5, False, "float32"),  # two rows of three columns, five apart, to each of the seven
    TopK(2, 33, 1, 33, 33, 33, True, "int32"),
    TopK(1, 20, 4, 20, 4, 4, False, "int64"),
    TopK(1, 1, 1, 1, 1, 1, True, "float32"),
]
SUMS = [
    Cumulative(3, 37, 1, 37, 40, False, False, False, "float32"),
    Cumulative(2, 5, 42, 21, 24, True, True, False, "float32"),
    Cumulative(2, 9, 16, 16, 16, False, True, True, "int64"),
    Cumulative(1, 12, 1, 12, 12, True, False, True, "int32"),
]


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    return library_on(request.param, tmp_path_factory.mktemp("kernels"), refs([*SORTS, *SUMS]))


def held(p: TopK | Cumulative, x: NDArray) -> NDArray:
    """x [outer,n,inner] with what lies between its rows."""
    rows = np.full((x.size // p.cols, p.ld), 99, x.dtype)
    rows[:, : p.cols] = x.reshape(-1, p.cols)
    return rows.reshape(-1)[: p.span].copy()


def drawn(p: TopK | Cumulative, rng: np.random.Generator, few: bool) -> NDArray:
    shape = (p.outer, p.n, p.inner)
    if p.dtype != "float32":
        return rng.integers(-3, 4, shape).astype(p.dtype)
    return (rng.integers(-2, 3, shape) / 2 if few else rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("p", SORTS, ids=lambda p: f"{p.outer}x{p.n}x{p.inner}-{p.dtype}")
@settings(max_examples=8, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6), few=st.booleans())
def test_sorted_as_numpy_does_it(library: AnyLibrary, p: TopK, seed: int, few: bool) -> None:
    """Exactly, few values (and so many ties, and both zeros) or many."""
    x = drawn(p, np.random.default_rng(seed), few)
    if few and p.dtype == "float32":
        x[x == 0] = np.where(np.random.default_rng(seed).random((x == 0).sum()) < 0.5, -0.0, 0.0)
    order = np.argsort(-x if p.largest else x, 1, kind="stable")[:, : p.k]
    out = (p.outer, p.k, p.inner)
    values, indices = library.call(ref(p), [held(p, x), unset(*out, dtype=p.dtype), unset(*out, dtype="int64")], "rww")
    assert np.array_equal(indices, order)
    assert np.take_along_axis(x, order, 1).tobytes() == values.tobytes()


@pytest.mark.parametrize("largest", [False, True])
def test_ranks_are_a_permutation_whatever_comes(largest: bool, tmp_path: Path) -> None:
    """NaN and infinities: no place stays unwritten, so that no index derived from it points outside."""
    p = TopK(1, 40, 1, 40, 40, 40, largest, "float32")
    x = np.random.default_rng(0).choice(np.float32([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, 3.0]), 40)
    out = [unset(40), unset(40, dtype="int64")]
    values, indices = Library(tmp_path, refs([p])).call(ref(p), [x, *out], "rww")
    assert sorted(indices.tolist()) == list(range(40))
    assert values.tobytes() == x[indices].tobytes()
    whole = values[np.isfinite(values)]
    assert (np.diff(whole) <= 0).all() if largest else (np.diff(whole) >= 0).all()


@pytest.mark.parametrize("p", SUMS, ids=lambda p: f"{p.outer}x{p.n}x{p.inner}-{p.dtype}")
@settings(max_examples=4, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_cumulative_equals_its_definition(library: AnyLibrary, p: Cumulative, seed: int) -> None:
    x = drawn(p, np.random.default_rng(seed), few=False)
    wide = np.flip(x, 1) if p.reverse else x
    wide = wide.astype(np.float64 if p.dtype == "float32" else np.int64)
    total = np.cumprod(wide, 1) if p.product else np.cumsum(wide, 1)
    if p.exclusive:
        total = np.concatenate([np.full_like(total[:, :1], p.product), total[:, :-1]], 1)
    wanted = np.flip(total, 1) if p.reverse else total
    (y,) = library.call(ref(p), [held(p, x), unset(*x.shape, dtype=p.dtype)], "rw", seed=seed)
    if p.dtype == "float32":
        assert np.abs(y - wanted).max() <= tolerance("runtime", "float32", wanted)
    else:
        assert np.array_equal(y, wanted.astype(p.dtype))


def test_the_rules_against_onnxruntime(tmp_path: Path) -> None:
    """Axes first, in the middle and last; windows as inputs; results that nobody reads; rows scattered by rank."""
    b = Builder(3)
    left = b.op("Slice", "x", b.const([1]), b.const([8]), b.const([2]))  # [1,3,7], rows 10 apart
    summed = b.op("CumSum", left, b.const(2), exclusive=1)
    b.op("CumProd", b.op("Tanh", left), b.const([1]), reverse=1, out="scaled")
    b.nodes.append(_node("TopK", [b.op("Add", summed, "scaled"), b.const([7])], ["ordered", "rows"], largest=0))
    b.nodes.append(_node("TopK", ["x", b.const([2])], ["good", "best"], axis=1))
    b.nodes.append(_node("TopK", ["past.s", b.const([1])], ["least", "where"], axis=0, largest=0))
    b.op("ScatterElements", b.const(np.zeros((1, 3, 7)), "float32"), "rows", "ordered", axis=2, out="restored")
    b.op("GatherElements", "x", "best", axis=1, out="z")
    b.op("CumSum", "best", b.const(1), out="count")
    b.op("Add", "least", "x", out="present.s")
    outputs = [
        port("restored", [1, 3, 7]), port("z", [1, 2, 10]), port("count", [1, 2, 10], "int64"),
        port("present.s", [1, 3, 10]),
    ]  # fmt: skip
    model = model_of(b.nodes, [port("x", [1, 3, 10]), port("past.s", [1, 3, 10])], outputs, b.weights)
    machine, theirs = Machine(tmp_path, {"sorts": model}), onnx_stream(model)
    names = [c.kernel.op for c in machine.programs["sorts"].calls if hasattr(c.kernel, "op")]
    assert names.count("top_k") == 3 and names.count("cumulative") == 3
    ours, rng = machine.step("sorts"), np.random.default_rng(0)
    for _ in range(3):
        x = rng.standard_normal((1, 3, 10)).astype(np.float32)
        got, want = ours(x=x), theirs(x=x)
        for key, value in want.items():
            assert np.abs(got[key] - value).max() <= tolerance("runtime", "float32", value), key


def _node(op: str, inputs: list[str], outputs: list[str], **attrs: int):  # type: ignore[no-untyped-def]
    from onnx import helper

    return helper.make_node(op, inputs, outputs, **attrs)
