"""y[T,K] = W[token[t], :] from the packed table that the output head reads too: a thread per number."""

from __future__ import annotations

from typing import Any

from ..kernels.embed import Embed
from ..tvm_api import T
from . import Built
from ._emit import Expr, blocks_of, elementwise, half, kernel, let, store

THREADS = 128
ROWS = 16


def build(name: str, p: Embed, gpu: Any) -> Built:
    storage = "float32" if p.wdtype == "float32" else "uint16"
    size = -(-p.M // ROWS) * p.K * ROWS
    params = [("tokens", "int64", p.T), ("w", storage, size), ("y", "float32", p.T * p.K)]
    grid = blocks_of(p.T * p.K, THREADS)
    with kernel(name, params, grid, THREADS, gpu) as k:

        def one(i: Expr) -> None:
            row = let(T.Cast("int32", k["tokens"][i // p.K]))
            raw = k["w"][(row // ROWS * p.K + i % p.K) * ROWS + row % ROWS]
            if p.wdtype == "bfloat16":
                raw = T.reinterpret("float32", T.Cast("uint32", raw) << T.uint32(16))
            elif p.wdtype == "float16":
                raw = half(T.Cast("uint32", raw))
            store(k["y"], i, raw)

        elementwise(k, grid * THREADS, p.T * p.K, one)
    return Built(k.func, grid, THREADS)
