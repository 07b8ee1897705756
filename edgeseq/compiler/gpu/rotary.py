"""Rotary position embedding (see kernels/rotary): a thread per pair."""

from __future__ import annotations

from typing import Any

from ..kernels.rotary import Rotary
from . import Built
from ._emit import Expr, blocks_of, elementwise, kernel, let, store

THREADS = 128


def build(name: str, p: Rotary, gpu: Any) -> Built:
    half, pairs = p.d // 2, p.T * p.H * (p.d // 2)
    params = [("x", (p.T - 1) * p.ldx + p.H * p.d), ("cos", p.T * half), ("sin", p.T * half), ("y", p.T * p.H * p.d)]
    grid = blocks_of(pairs, THREADS)
    with kernel(name, [(n, "float32", size) for n, size in params], grid, THREADS, gpu) as k:

        def one(n: Expr) -> None:
            i, head, t = let(n % half), let(n // half % p.H), let(n // half // p.H)
            first, apart = (2 * i, 1) if p.interleaved else (i, half)
            source, target = let(t * p.ldx + head * p.d + first), let((t * p.H + head) * p.d + first)
            c, s = let(k["cos"][t * half + i]), let(k["sin"][t * half + i])
            x1, x2 = let(k["x"][source]), let(k["x"][source + apart])
            store(k["y"], target, x1 * c - x2 * s)
            store(k["y"], target + apart, x2 * c + x1 * s)

        elementwise(k, grid * THREADS, pairs, one)
    return Built(k.func, grid, THREADS)
