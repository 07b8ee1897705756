"""A long causal convolution over its whole past, with the append (see kernels/long_conv).

A block has 16 channels: it appends their new rows, then its lines share out the rows of the past, each read once for
four tokens, and their sums meet in shared memory.
"""

from __future__ import annotations

from typing import Any

from ..kernels.long_conv import TOKENS, LongConv
from ..tvm_api import T, tirx
from . import Built
from ._emit import (
    Expr,
    Kernel,
    blocks_of,
    f32,
    kernel,
    let,
    local,
    loop,
    shared,
    store,
    strided,
    sync,
    sync_memory,
    when,
    zero,
)

CHANNELS = 16
LINES = 16


def build(name: str, p: LongConv, gpu: Any) -> Built:
    floats = {
        "x": (p.T - 1) * p.ldx + p.C, "h": -(-p.C // CHANNELS) * CHANNELS * p.L, "d": p.C, "past": p.M * p.C,
        "y": p.T * p.C,
    }  # fmt: skip
    sizes = {a: ("float32", n) for a, n in floats.items()} | {"position": ("int64", 1)}
    grid, threads = blocks_of(p.C, CHANNELS), CHANNELS * LINES
    with kernel(name, [(a, *sizes[a]) for a in p.args], grid, threads, gpu) as k:
        _Channel(k, p).run()
    return Built(k.func, grid, threads)


class _Channel:
    """One channel and one line's share of its past."""

    def __init__(self, k: Kernel, p: LongConv) -> None:
        self.k, self.p = k, p
        self.lane, self.line = k.thread % CHANNELS, k.thread // CHANNELS
        self.c = let(k.block * CHANNELS + self.lane)
        self.exists: Expr | bool = True if p.C % CHANNELS == 0 else self.c < p.C
        self.position = let(T.Cast("int32", k["position"][0]))
        self.tokens = min(TOKENS, p.T)
        self.sums = shared(self.tokens * k.threads)

    def run(self) -> None:
        p, k = self.p, self.k

        def append(n: Expr) -> None:
            t, c = n // CHANNELS, k.block * CHANNELS + n % CHANNELS
            with when(True if p.C % CHANNELS == 0 else c < p.C):
                store(k["past"], (self.position + t) * p.C + c, k["x"][t * p.ldx + c])

        strided(k, p.T * CHANNELS, append)
        sync_memory()
        loop(p.T // self.tokens, lambda i: self._some(i * self.tokens, self.tokens))
        if p.T % self.tokens:
            self._some(p.T // self.tokens * self.tokens, p.T % self.tokens)

    def _some(self, t0: Expr, count: int) -> None:
        """Tokens t0 .. t0 + count - 1."""
        p, k = self.p, self.k
        acc = local(count)
        zero(acc, count)
        newest = let(self.position + (t0 + count - 1))
        rows = let(T.min(newest + 1, p.L + count - 1))  # that one of the tokens sees

        def row(back: Expr) -> None:
            x = let(k["past"][(newest - back) * p.C + self.c])
            for i in range(count):
                tap = back - (count - 1 - i)
                with when(True if count == 1 else T.And(tap >= 0, tap < p.L)):
                    store(acc, i, acc[i] + k["h"][(self.c // CHANNELS * p.L + tap) * CHANNELS + self.lane] * x)

        with when(self.exists), T.serial(tirx.floordiv(rows + (LINES - 1 - self.line), LINES)) as n:
            row(let(n * LINES + self.line))
        for i in range(count):
            store(self.sums, i * k.threads + k.thread, acc[i])
        sync()
        with when(self.exists), when(self.line < count):
            t = t0 + self.line
            y = local(1)
            store(y, 0, k["d"][self.c] * k["x"][t * p.ldx + self.c] if p.skip else f32(0.0))
            with T.serial(LINES) as line:
                store(y, 0, y[0] + self.sums[self.line * k.threads + line * CHANNELS + self.lane])
            store(k["y"], t * p.C + self.c, y[0])
        sync()
