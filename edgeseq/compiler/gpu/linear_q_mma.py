"""y[T,M] = x[T,K] W[M,K]^T + bias + residual on tensor cores, 4- or 8-bit weights and int8 activations.

A block of 32 k is one `mma` of bytes, exact in int32 as everywhere, and the packed weights are its fragments: lane
4g + i has words i and i + 4 of rows 2g and 2g + 1, which 4-bit codes hold in one nibble each. Sums begin with the
bits of the float32 1e7 (and the zero point's part), so that subtracting that is all that makes floats of them.
"""

from __future__ import annotations

from typing import Any

from ..kernels._quantise import BLOCK, blocks
from ..kernels.linear_q import PAIR_BYTES, LinearQ
from ..tvm_api import T, tirx
from . import Built
from ._emit import Expr, Kernel, f32, half, let, local, store, words
from ._mma import GROUPS, Tile, Tiling, masked, mma, mma_kernel, tiling

MIDDLE, MIDDLE_BITS = 1e7, 0x4B189680
"""Between 2^23 and 2^24, with room for a sum on either side (32 * 128 * 127 at most), and few digits in decimal."""


def build(name: str, p: LinearQ, params: list[tuple[str, str, int]], gpu: Any) -> Built:
    t = tiling(p.M, p.T, blocks(p.K), gpu)
    with mma_kernel(name, params, t, gpu) as k:
        _Bytes(k, p, t).run()
    return Built(k.func, t.across * t.along, k.threads)


class _Bytes(Tile):
    def __init__(self, k: Kernel, p: LinearQ, t: Tiling) -> None:
        super().__init__(k, p, t)
        self.lines = p.bits // 4  # of two words each
        self.raw, self.a = local(2 * self.lines * GROUPS, "uint32"), local(4 * GROUPS, "uint32")
        self.bits, self.scales = local(GROUPS, "uint32"), local(2 * GROUPS)
        self.base = [let(g * (t.steps // 2 * (PAIR_BYTES[p.bits] // 4)) + 2 * self.quad) for g in self.group]

    def ask(self, step: Expr) -> None:
        pair, size = PAIR_BYTES[self.p.bits] // 4, BLOCK * self.p.bits // 2
        for m in range(GROUPS):
            start = let(self.base[m] + step // 2 * pair)
            for line in range(self.lines):
                at = start + (16 + line * 64) + step % 2 * size + self.place * 16
                words(self.k["w"], tirx.floordiv(at, 2), self.raw, 2 * (m * self.lines + line), 2)
            store(self.bits, m, self.k["ws"][start - self.quad + step % 2 * 8])

    def take(self, valid: Expr | bool) -> None:
        for m in range(GROUPS):
            if self.p.bits == 4:
                low = T.uint32(0x0F0F0F0F)
                for r in range(2):
                    store(self.a, 4 * m + r, self.raw[2 * m + r] & low)
                    store(self.a, 4 * m + 2 + r, self.raw[2 * m + r] >> T.uint32(4) & low)
            else:
                for i in range(4):
                    store(self.a, 4 * m + i, self.raw[4 * m + i])
            both = let(masked(self.bits[m], valid))
            store(self.scales, 2 * m, half(both & T.uint32(0xFFFF)))
            store(self.scales, 2 * m + 1, half(both >> T.uint32(16)))

    def multiply(self, step: Expr, n: int) -> None:
        p, k, count = self.p, self.k, self.t.steps
        first = self.octet(n) * 8
        own = let(self._token(first + self.quad) * count + step)
        b = [let(T.reinterpret("uint32", k["q"][own * 8 + self.place + 4 * r])) for r in range(2)]
        columns = [let(self._token(first + 2 * self.place + c) * count + step) for c in range(2)]
        scales = [let(k["scale"][c]) for c in columns]
        start = (
            [let(k["offset"][c] + T.int32(MIDDLE_BITS)) for c in columns] if p.bits == 4 else [T.int32(MIDDLE_BITS)] * 2
        )
        for m in range(GROUPS):
            ints = local(4, "int32")
            for i in range(4):
                store(ints, i, start[i % 2])
            mma("s8", ints, 0, [self.a[4 * m + i] for i in range(4)], b)
            for i in range(4):
                to = (n * GROUPS + m) * 4 + i
                total = T.reinterpret("float32", ints[i]) - f32(MIDDLE)
                store(self.acc, to, self.acc[to] + total * (self.scales[2 * m + i // 2] * scales[i % 2]))

    def _token(self, token: Expr) -> Expr:
        return token if self.p.T % 8 == 0 else T.min(token, self.p.T - 1)
