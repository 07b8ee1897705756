"""y = x, `n` elements: a thread per element."""

from __future__ import annotations

from typing import Any

from ..kernels.copy import Copy
from . import Built
from ._emit import blocks_of, elementwise, kernel, store

THREADS = 128


def build(name: str, p: Copy, gpu: Any) -> Built:
    dtype = "uint8" if p.dtype == "bool" else "uint16" if p.dtype == "float16" else p.dtype
    grid = blocks_of(p.n, THREADS)
    with kernel(name, [("x", dtype, p.n), ("y", dtype, p.n)], grid, THREADS, gpu) as k:
        elementwise(k, grid * THREADS, p.n, lambda i: store(k["y"], i, k["x"][i]))
    return Built(k.func, grid, THREADS)
