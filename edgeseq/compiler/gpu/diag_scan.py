"""Complex modes over T tokens, the state in place (see kernels/diag_scan).

A block has 32 channels, and `parts` threads share the modes of a channel, in registers over all tokens; the parts'
sums meet in shared memory, a tile of tokens at a time.
"""

from __future__ import annotations

from typing import Any

from ..kernels.diag_scan import DiagScan
from . import Built
from ._emit import Expr, Kernel, blocks_of, f32, kernel, let, local, loop, shared, store, sync, when

CHANNELS = 32
MOST_MODES = 4  # of a thread, where there are threads enough
TILE = 8


def build(name: str, p: DiagScan, gpu: Any) -> Built:
    packed = -(-p.C // 16) * 16 * 2 * p.N
    sizes = {
        "u": (p.T - 1) * p.ldu + p.C, "a": 2 * p.N if p.shared else packed, "c": packed, "d": p.C,
        "past": 2 * p.N * p.C, "y": p.T * p.C,
    }  # fmt: skip
    parts = 1
    while parts * MOST_MODES < p.N and 2 * parts * CHANNELS <= gpu.threads:
        parts *= 2
    grid, threads = blocks_of(p.C, CHANNELS), parts * CHANNELS
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args], grid, threads, gpu) as k:
        _Scan(k, p, parts).run()
    return Built(k.func, grid, threads)


class _Scan:
    """The modes of one thread: part, part + parts, ..."""

    def __init__(self, k: Kernel, p: DiagScan, parts: int) -> None:
        self.k, self.p, self.parts, self.each = k, p, parts, blocks_of(p.N, parts)
        self.lane = k.thread % CHANNELS if parts > 1 else k.thread
        self.part = k.thread // CHANNELS if parts > 1 else 0
        self.channel = let(k.block * CHANNELS + self.lane)
        self.exists: Expr | bool = True if p.C % CHANNELS == 0 else self.channel < p.C
        self.S, self.A, self.C = (local(2 * self.each) for _ in range(3))
        self.tile = min(TILE, p.T)
        self.sums = shared(self.tile * k.threads)

    def _modes(self) -> list[tuple[int, Expr, Expr | bool]]:
        """(register of the real part, mode, whether there is one)."""
        whole, rest = divmod(self.p.N, self.parts)
        found = [(i, i * self.parts + self.part) for i in range(self.each)]
        return [(2 * i, n, True if i < whole else self.part < rest) for i, n in found]

    def run(self) -> None:
        p, k, c = self.p, self.k, self.channel
        for i, n, inside in self._modes():
            for part in range(2):
                if inside is not True:
                    for registers in (self.S, self.A, self.C):
                        store(registers, i + part, f32(0.0))
                with when(self.exists), when(inside):
                    row = let(2 * n + part)
                    packed = let((c // 16 * (2 * p.N) + row) * 16 + c % 16)
                    store(self.S, i + part, k["past"][row * p.C + c])
                    store(self.A, i + part, k["a"][row if p.shared else packed])
                    store(self.C, i + part, k["c"][packed])
        loop(p.T // self.tile, lambda n: self._tile(n * self.tile, self.tile))
        if p.T % self.tile:
            self._tile(p.T // self.tile * self.tile, p.T % self.tile)
        for i, n, inside in self._modes():
            for part in range(2):
                with when(self.exists), when(inside):
                    store(k["past"], (2 * n + part) * p.C + c, self.S[i + part])

    def _tile(self, t0: Expr, count: int) -> None:
        with when(self.exists):
            loop(count, lambda u: self._token(t0, u))
        sync()
        for first in range(0, count, self.parts):
            left = count - first
            with when(self.exists), when(True if left >= self.parts else self.part < left):
                self._finish(t0, first + self.part)
        sync()

    def _token(self, t0: Expr, u: Expr) -> None:
        p = self.p
        x = let(self.k["u"][(t0 + u) * p.ldu + self.channel])
        total = local(1)
        store(total, 0, f32(0.0))
        for i, _, _ in self._modes():
            re = let(self.A[i] * self.S[i] - self.A[i + 1] * self.S[i + 1] + x)
            im = let(self.A[i] * self.S[i + 1] + self.A[i + 1] * self.S[i])
            store(self.S, i, re)
            store(self.S, i + 1, im)
            store(total, 0, total[0] + (self.C[i] * re - self.C[i + 1] * im))
        store(self.sums, (u * self.parts + self.part) * CHANNELS + self.lane, total[0])

    def _finish(self, t0: Expr, u: Expr) -> None:
        p, k, c = self.p, self.k, self.channel
        y = self.sums[u * self.parts * CHANNELS + self.lane]
        for part in range(1, self.parts):
            y = y + self.sums[(u * self.parts + part) * CHANNELS + self.lane]
        if p.skip:
            y = y + k["d"][c] * k["u"][(t0 + u) * p.ldu + c]
        store(k["y"], (t0 + u) * p.C + c, y)
