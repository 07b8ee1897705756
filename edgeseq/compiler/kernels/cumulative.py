"""y_i = x_0 op x_1 op ... op x_i along one axis, op a sum or a product; exclusive ends before x_i, reverse begins last.

Lanes are neighbouring lines where the axis is not the last one. One block = the lines of one row of x.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T, tirx
from . import Built
from ._emit import Expr, kernel, load, local, pieces, store

DTYPES = ("float32", "int32", "int64")


@dataclass(frozen=True)
class Cumulative:
    """x [outer,n,inner], of which `cols` elements lie together and rows of that many lie `ld` apart; y is dense."""

    outer: int
    n: int
    inner: int
    cols: int
    ld: int
    product: bool
    exclusive: bool
    reverse: bool
    dtype: str
    args = ("x", "y")

    @property
    def span(self) -> int:
        rows = self.outer * self.n * self.inner // self.cols
        return (rows - 1) * self.ld + self.cols


def build(name: str, p: Cumulative) -> Built:
    last = p.inner == 1  # the axis is: its elements are the columns
    rows = 1 if last else p.inner // p.cols
    with kernel(name, [("x", p.dtype, p.span), ("y", p.dtype, p.outer * p.n * p.inner)]) as kern:
        o, row = kern.block // rows, kern.block % rows

        def lines(column: int, lanes: int) -> None:
            total = local(lanes, p.dtype)
            neutral = tirx.const(1 if p.product else 0, p.dtype)
            store(total, 0, neutral if lanes == 1 else T.broadcast(neutral, lanes), lanes)
            with T.serial(p.n) as step:
                i = p.n - 1 - step if p.reverse else step
                source = o * p.ld + i if last else ((o * p.n + i) * rows + row) * p.ld + column
                target = o * p.n + i if last else ((o * p.n + i) * rows + row) * p.cols + column
                if p.exclusive:
                    store(kern["y"], target, load(total, 0, lanes), lanes)
                store(total, 0, _next(p, load(total, 0, lanes), load(kern["x"], source, lanes)), lanes)
                if not p.exclusive:
                    store(kern["y"], target, load(total, 0, lanes), lanes)

        for column, lanes in [(0, 1)] if last else pieces(p.cols):
            lines(column, lanes)
    return Built(kern.func, p.outer * rows)


def _next(p: Cumulative, total: Expr, x: Expr) -> Expr:
    return total * x if p.product else total + x
