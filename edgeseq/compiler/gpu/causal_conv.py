"""Causal depthwise convolution with its state in place (see kernels/causal_conv).

A block has 32 channels; lines of its threads share out the tokens of a chunk, each beginning with the inputs before its
own. The state is written when all have read it.
"""

from __future__ import annotations

from typing import Any

from ..kernels.causal_conv import CausalConv
from ..tvm_api import T
from . import Built
from ._emit import (
    Buffer,
    Expr,
    Kernel,
    blocks_of,
    f32,
    kernel,
    let,
    local,
    loop,
    shared,
    silu,
    store,
    sync_memory,
    when,
)
from ._quantise import BLOCK, blocks, output_params, write_block

CHANNELS = 32
LINES = 8


def build(name: str, p: CausalConv, gpu: Any) -> Built:
    floats = {"x": (p.T - 1) * p.ldx + p.C, "w": p.k * p.C, "bias": p.C, "past": (p.k - 1) * p.C, "y": p.T * p.C}
    sizes = {a: ("float32", n) for a, n in floats.items()} | output_params(p.T, p.C)
    each = blocks_of(p.T, LINES)  # tokens of a line
    threads = CHANNELS * blocks_of(p.T, each)
    grid = blocks_of(p.C, CHANNELS)
    with kernel(name, [(a, *sizes[a]) for a in p.args], grid, threads, gpu) as k:
        _Channel(k, p, each).run()
    return Built(k.func, grid, threads)


class _Channel:
    """One channel, `each` tokens."""

    def __init__(self, k: Kernel, p: CausalConv, each: int) -> None:
        self.k, self.p, self.each = k, p, each
        self.lines = blocks_of(p.T, each)
        self.c = let(k.block * CHANNELS + k.thread % CHANNELS)
        self.line = let(k.thread // CHANNELS) if self.lines > 1 else 0
        self.exists: Expr | bool = True if p.C % CHANNELS == 0 else self.c < p.C
        self.window = local(max(1, p.k - 1))
        self.taps = local(p.k)
        self.scratch: Buffer = shared(k.threads) if p.quant is not None else None

    def run(self) -> None:
        p, k = self.p, self.k
        first = let(self.line * self.each) if self.lines > 1 else 0
        with when(self.exists):
            for j in range(p.k):
                store(self.taps, j, k["w"][j * p.C + self.c])
            for j in range(p.k - 1):
                self._before(first, j)
        loop(self.each, lambda i: self._token(first + i))
        if p.k == 1:
            return
        if self.lines > 1:
            sync_memory()
        with when(self.exists), when(self.line == self.lines - 1 if self.lines > 1 else True):
            for j in range(p.k - 1):
                store(k["past"], j * p.C + self.c, self.window[j])

    def _before(self, first: Expr, j: int) -> None:
        """window[j]: the input j + 1 - k tokens before `first`, which may lie in the state."""
        p, k = self.p, self.k
        past = k["past"][(first + j) * p.C + self.c]
        if self.lines == 1:
            store(self.window, j, past)
            return
        at = first + (j - (p.k - 1))
        with T.If(at < 0):
            with T.Then():
                store(self.window, j, past)
            with T.Else():
                store(self.window, j, k["x"][at * p.ldx + self.c])

    def _token(self, t: Expr) -> None:
        p, k = self.p, self.k
        y = local(1)
        store(y, 0, f32(0.0))
        inside = True if p.T % self.each == 0 else t < p.T
        with when(self.exists), when(inside):
            x = let(k["x"][t * p.ldx + self.c])
            total = self.taps[p.k - 1] * x
            for j in range(p.k - 1):
                total = total + self.taps[j] * self.window[j]
            total = let(total + k["bias"][self.c] if p.bias else total)
            store(y, 0, silu(total) if p.silu else total)
            store(k["y"], t * p.C + self.c, y[0])
            for j in range(p.k - 2):
                store(self.window, j, self.window[j + 1])
            if p.k > 1:
                store(self.window, p.k - 2, x)
        if p.quant is not None:  # C is a multiple of 64: every channel exists
            write_block(k, t * blocks(p.C) + self.c // BLOCK, y[0], p.quant, self.scratch, inside)
