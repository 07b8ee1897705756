"""The k first of n elements in order (see kernels/top_k): a thread per element counts those before it."""

from __future__ import annotations

from typing import Any

from ..kernels.top_k import TopK, _key
from ..tvm_api import T, tirx
from . import Built
from ._emit import Expr, blocks_of, elementwise, kernel, let, local, store, when

THREADS = 64


def build(name: str, p: TopK, gpu: Any) -> Built:
    count, out = p.outer * p.n * p.inner, p.outer * p.k * p.inner
    grid = blocks_of(count, THREADS)
    params = [("x", p.dtype, p.span), ("values", p.dtype, out), ("indices", "int64", out)]
    with kernel(name, params, grid, THREADS, gpu) as k:

        def element(index: Expr) -> None:
            line, at = let(index // p.n), let(index % p.n)
            o, j = let(line // p.inner), let(line % p.inner)
            start = let(p.start(o, j))
            mine, rank = let(_key(k["x"][start + at * p.stride], p, 1)), local(1, "int32")
            store(rank, 0, T.int32(0))
            with T.serial(p.n) as i:
                other = let(_key(k["x"][start + i * p.stride], p, 1))
                before = other > mine if p.largest else other < mine
                first = T.Or(before, T.And(other == mine, i < at))
                store(rank, 0, rank[0] + tirx.Select(first, T.int32(1), T.int32(0)))
            with when(rank[0] < p.k):
                to = let((o * p.k + rank[0]) * p.inner + j)
                store(k["values"], to, k["x"][start + at * p.stride])
                store(k["indices"], to, T.Cast("int64", at))

        elementwise(k, grid * THREADS, count, element)
    return Built(k.func, grid, THREADS)
