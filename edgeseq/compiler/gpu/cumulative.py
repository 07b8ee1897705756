"""Cumulative sums and products along one axis (see kernels/cumulative): a thread per line."""

from __future__ import annotations

from typing import Any

from ..kernels.cumulative import Cumulative, _next
from ..tvm_api import T, tirx
from . import Built
from ._emit import Expr, blocks_of, elementwise, kernel, local, store

THREADS = 32


def build(name: str, p: Cumulative, gpu: Any) -> Built:
    last = p.inner == 1
    lines = p.outer * p.inner
    grid = blocks_of(lines, THREADS)
    params = [("x", p.dtype, p.span), ("y", p.dtype, p.outer * p.n * p.inner)]
    with kernel(name, params, grid, THREADS, gpu) as k:

        def line(n: Expr) -> None:
            o, j = n // p.inner, n % p.inner
            row, column, rows = j // p.cols, j % p.cols, p.inner // p.cols
            total = local(1, p.dtype)
            store(total, 0, tirx.const(1 if p.product else 0, p.dtype))
            with T.serial(p.n) as step:
                i = p.n - 1 - step if p.reverse else step
                source = o * p.ld + i if last else ((o * p.n + i) * rows + row) * p.ld + column
                target = o * p.n + i if last else (o * p.n + i) * p.inner + j
                if p.exclusive:
                    store(k["y"], target, total[0])
                store(total, 0, _next(p, total[0], k["x"][source]))
                if not p.exclusive:
                    store(k["y"], target, total[0])

        elementwise(k, grid * THREADS, lines, line)
    return Built(k.func, grid, THREADS)
