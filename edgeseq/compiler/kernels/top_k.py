"""The k first of n elements in order, and where they were; of equal elements the one with the lower index is first.

rank_i = #{j : x_j before x_i, or x_j = x_i and j < i};   values[rank_i] = x_i, indices[rank_i] = i   where rank_i < k

Lanes are the elements whose rank is counted. Floats are compared as integers of the same order, -0 as 0; NaN counts
as an infinity beyond the infinities, so that ranks are a permutation whatever the input holds. One block = up to 16
elements of one line; lines are [outer, n, inner] along n.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T, tirx
from . import Built
from ._emit import LANES, Expr, Kernel, kernel, load, local, store

DTYPES = ("float32", "int32", "int64")


@dataclass(frozen=True)
class TopK:
    """x [outer,n,inner], of which `cols` elements lie together and rows of that many lie `ld` apart."""

    outer: int
    n: int
    inner: int
    k: int
    cols: int
    ld: int
    largest: bool
    dtype: str
    args = ("x", "values", "indices")

    @property
    def stride(self) -> int:
        """Between neighbours of a line."""
        return 1 if self.inner == 1 else self.inner // self.cols * self.ld

    @property
    def span(self) -> int:
        rows = self.outer * self.n * self.inner // self.cols
        return (rows - 1) * self.ld + self.cols

    def start(self, o: Expr, j: Expr) -> Expr:
        """Offset of the first element of line (o, j)."""
        if self.inner == 1:
            return o * self.ld
        return o * (self.n * self.stride) + j // self.cols * self.ld + j % self.cols


def _key(value: Expr, p: TopK, lanes: int) -> Expr:
    """An integer that orders as `value` does."""
    if p.dtype != "float32":
        return value
    bits = T.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", value)
    sign = T.shift_right(bits, _all(31, "int32", lanes))  # -1 or 0; both zeros become 0
    return T.bitwise_xor(bits, T.bitwise_and(sign, _all(2**31 - 1, "int32", lanes))) - sign


def _all(value: Expr, dtype: str, lanes: int) -> Expr:
    scalar = tirx.const(value, dtype) if isinstance(value, int) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def build(name: str, p: TopK) -> Built:
    width = LANES if p.stride == 1 else 1
    strips = -(-p.n // width)
    out = p.outer * p.k * p.inner
    with kernel(name, [("x", p.dtype, p.span), ("values", p.dtype, out), ("indices", "int64", out)]) as kern:
        line, strip = kern.block // strips, kern.block % strips
        o, j = line // p.inner, line % p.inner
        if p.n % width == 0:
            _strip(kern, p, o, j, strip * width, width)
        else:
            with T.If(strip < strips - 1):
                with T.Then():
                    _strip(kern, p, o, j, strip * width, width)
                with T.Else():
                    _strip(kern, p, o, j, (strips - 1) * width, p.n % width)
    return Built(kern.func, p.outer * p.inner * strips)


def _strip(kern: Kernel, p: TopK, o: Expr, j: Expr, at: Expr, lanes: int) -> None:
    x, start = kern["x"], p.start(o, j)
    key_type = "int64" if p.dtype == "int64" else "int32"
    mine, rank = local(lanes, key_type), local(lanes, "int32")
    store(mine, 0, _key(load(x, start + at * p.stride, lanes), p, lanes), lanes)
    store(rank, 0, _all(0, "int32", lanes), lanes)
    index = at if lanes == 1 else T.ramp(at, 1, lanes)
    one, zero = _all(1, "int32", lanes), _all(0, "int32", lanes)
    with T.serial(p.n) as i:
        other = _all(_key(x[start + i * p.stride], p, 1), key_type, lanes)
        own = load(mine, 0, lanes)
        before = other > own if p.largest else other < own
        tied = tirx.Select(other == own, tirx.Select(_all(i, "int32", lanes) < index, one, zero), zero)
        store(rank, 0, load(rank, 0, lanes) + tirx.Select(before, one, tied), lanes)
    for lane in range(lanes):
        place = rank[lane]
        with T.If(place < p.k):
            with T.Then():
                to = (o * p.k + place) * p.inner + j
                T.buffer_store(kern["values"], x[start + (at + lane) * p.stride], [to])
                T.buffer_store(kern["indices"], tirx.Cast("int64", at + lane), [to])
