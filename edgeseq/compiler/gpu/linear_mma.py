"""y[T,M] = act(x[T,K] W[M,K]^T + bias[M]) + residual[T,M] on tensor cores, W of 16-bit floats packed `rows16`.

x comes as `halves` of it; every part is multiplied by the weights as they are. A lane reads a word of two rows at 8 k
of a step, in lines of 128 bytes for a warp, and pairs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.linear import Linear
from ..tvm_api import T
from . import Built, halves
from ._emit import Expr, Kernel, blocks_of, let, local, store, words, zero
from ._mma import GROUPS, STEP, Tile, Tiling, masked, mma, mma_kernel, tiling
from .linear import ROWS

KINDS = {"float16": "f16", "bfloat16": "bf16"}
WORDS = ROWS // 2  # of 16 rows at one k


@dataclass(frozen=True)
class LinearMma(Linear):
    """A product whose activations are `halves`; ldx has no meaning."""

    @property
    def args(self) -> tuple[str, ...]:
        return (*halves.OUTPUTS, *super().args[1:])


def build(name: str, p: LinearMma, gpu: Any) -> Built:
    t = tiling(p.M, p.T, blocks_of(p.K, STEP), gpu)
    sizes = halves.sizes(p.T, p.K, p.wdtype) | {
        "w": ("uint32", t.groups * p.K * WORDS),
        "bias": ("float32", p.M),
        "residual": ("float32", (p.T - 1) * p.ldr + p.M),
        "y": ("float32", p.T * p.M),
    }
    with mma_kernel(name, [(a, *sizes[a]) for a in p.args], t, gpu) as k:
        _Halves(k, p, t).run()
    return Built(k.func, t.across * t.along, k.threads)


class _Halves(Tile):
    def __init__(self, k: Kernel, p: LinearMma, t: Tiling) -> None:
        super().__init__(k, p, t)
        self.parts = halves.PARTS[p.wdtype]
        self.raw, self.a = local(8 * GROUPS, "uint32"), local(8 * GROUPS, "uint32")
        self.base = [let(g * (p.K * WORDS) + self.quad) for g in self.group]

    def ask(self, step: Expr) -> None:
        for m in range(GROUPS):
            for i in range(8):
                k = step * STEP + 4 * i + self.place
                if self.p.K % STEP:
                    k = T.min(k, self.p.K - 1)
                store(self.raw, 8 * m + i, self.k["w"][self.base[m] + k * WORDS])

    def take(self, valid: Expr | bool) -> None:
        for i in range(4 * GROUPS):
            first, second = self.raw[2 * i], self.raw[2 * i + 1]
            even = (first & T.uint32(0xFFFF)) | second << T.uint32(16)
            odd = first >> T.uint32(16) | second & T.uint32(0xFFFF0000)
            store(self.a, 2 * i, masked(even, valid))
            store(self.a, 2 * i + 1, masked(odd, valid))

    def multiply(self, step: Expr, n: int) -> None:
        b = local(4 * self.parts, "uint32")
        at = let((self.octet(n) * self.t.steps + step) * (self.parts * 32) + self.lane)
        for part in range(self.parts):
            words(self.k["h"], at + part * 32, b, 4 * part)
        for m in range(GROUPS):
            sums = local(4)
            zero(sums, 4)
            for s in range(2):
                a = [self.a[8 * m + 4 * s + i] for i in range(4)]
                for part in reversed(range(self.parts)):
                    mma(KINDS[self.p.wdtype], sums, 0, a, [b[4 * part + 2 * s + r] for r in range(2)])
            for i in range(4):
                to = (n * GROUPS + m) * 4 + i
                store(self.acc, to, self.acc[to] + sums[i])

    def scale(self, y: Expr, token: Expr) -> Expr:
        return y * self.k["scale"][token] if self.p.wdtype == "float16" else y
