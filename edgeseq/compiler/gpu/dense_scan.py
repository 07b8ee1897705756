"""A dense state space model per channel over T tokens, the state in place (see kernels/dense_scan).

A block has 16 channels, whose states lie in shared memory; its lines share out the rows of the matrices.
"""

from __future__ import annotations

from typing import Any

from ..kernels.dense_scan import DenseScan
from ..tvm_api import T
from . import Built
from ._emit import Expr, Kernel, blocks_of, f32, kernel, let, local, loop, power_of_two, shared, store, sync, when

CHANNELS = 16


def build(name: str, p: DenseScan, gpu: Any) -> Built:
    padded = blocks_of(p.C, CHANNELS) * CHANNELS
    sizes = {
        "u": (p.T - 1) * p.ldu + p.C, "a": padded * p.N * p.N, "b": padded * p.N, "c": padded * p.N, "d": p.C,
        "past": p.N * p.C, "y": p.T * p.C,
    }  # fmt: skip
    lines = min(power_of_two(p.N), gpu.threads // CHANNELS)
    grid, threads = blocks_of(p.C, CHANNELS), CHANNELS * lines
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args], grid, threads, gpu) as k:
        _Channel(k, p, lines).run()
    return Built(k.func, grid, threads)


class _Channel:
    """One channel, rows line, line + lines, ... of its matrix."""

    def __init__(self, k: Kernel, p: DenseScan, lines: int) -> None:
        self.k, self.p, self.lines, self.each = k, p, lines, blocks_of(p.N, lines)
        self.lane = k.thread % CHANNELS if lines > 1 else k.thread
        self.line = k.thread // CHANNELS if lines > 1 else 0
        self.c = let(k.block * CHANNELS + self.lane)
        self.exists: Expr | bool = True if p.C % CHANNELS == 0 else self.c < p.C
        self.S, self.sums, self.new = shared(p.N * CHANNELS), shared(k.threads), local(self.each)

    def _rows(self) -> list[tuple[int, Expr, Expr | bool]]:
        """(register, row, whether there is one)."""
        whole, rest = divmod(self.p.N, self.lines)
        found = [(i, i * self.lines + self.line) for i in range(self.each)]
        return [(i, n, True if i < whole else self.line < rest) for i, n in found]

    def run(self) -> None:
        p, k = self.p, self.k
        for _, n, inside in self._rows():
            with when(self.exists), when(inside):
                store(self.S, n * CHANNELS + self.lane, k["past"][n * p.C + self.c])
        sync()
        loop(p.T, self._token)
        for i, n, inside in self._rows():
            with when(self.exists), when(inside):
                store(k["past"], n * p.C + self.c, self.new[i])

    def _token(self, t: Expr) -> None:
        p, k = self.p, self.k
        out = local(1)
        store(out, 0, f32(0.0))
        with when(self.exists):
            u = let(k["u"][t * p.ldu + self.c])
            for i, n, inside in self._rows():
                with when(inside):
                    at = let((self.c // CHANNELS * p.N + n) * CHANNELS + self.lane)
                    store(self.new, i, k["b"][at] * u)
                    row = let((at - self.lane) * p.N + self.lane)
                    with T.serial(p.N) as j:
                        product = k["a"][row + j * CHANNELS] * self.S[j * CHANNELS + self.lane]
                        store(self.new, i, self.new[i] + product)
                    store(out, 0, out[0] + k["c"][at] * self.new[i])
        store(self.sums, k.thread, out[0])
        sync()
        for i, n, inside in self._rows():
            with when(self.exists), when(inside):
                store(self.S, n * CHANNELS + self.lane, self.new[i])
        with when(self.exists), when(self.line == 0):
            y = local(1)
            store(y, 0, k["d"][self.c] * k["u"][t * p.ldu + self.c] if p.skip else f32(0.0))
            with T.serial(self.lines) as line:
                store(y, 0, y[0] + self.sums[line * CHANNELS + self.lane])
            store(k["y"], t * p.C + self.c, y[0])
        sync()
