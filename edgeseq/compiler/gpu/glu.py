"""y[T,M] = silu(g[T,M]) u[T,M], as floats or as int8 blocks (see kernels/glu): a thread per number."""

from __future__ import annotations

from typing import Any

from ..kernels.glu import Glu
from . import Built
from ._emit import blocks_of, f32, kernel, let, local, shared, silu, store, when
from ._quantise import BLOCK, output_params, write_block

THREADS = 128


def build(name: str, p: Glu, gpu: Any) -> Built:
    sizes = {"g": ("float32", (p.T - 1) * p.ldg + p.M), "u": ("float32", (p.T - 1) * p.ldu + p.M)}
    sizes |= {"y": ("float32", p.T * p.M)} | output_params(p.T, p.M)
    grid = blocks_of(p.T * p.M, THREADS)
    with kernel(name, [(a, *sizes[a]) for a in p.args], grid, THREADS, gpu) as k:
        i, y = let(k.block * THREADS + k.thread), local(1)
        inside = True if p.T * p.M % THREADS == 0 else i < p.T * p.M
        store(y, 0, f32(0.0))
        with when(inside):
            t, column = let(i // p.M), let(i % p.M)
            g = let(k["g"][t * p.ldg + column])
            store(y, 0, silu(g) * k["u"][t * p.ldu + column])
            if p.quant is None:
                store(k["y"], i, y[0])
        if p.quant is not None:  # M is a multiple of 64: rows are whole blocks
            write_block(k, i // BLOCK, y[0], p.quant, shared(THREADS), inside)
    return Built(k.func, grid, THREADS)
