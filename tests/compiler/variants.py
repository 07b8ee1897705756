"""Parameters of every kernel: edge cases by hand, then seeded random sizes off the multiples of the vector width."""

from __future__ import annotations

import math

import numpy as np

from edgeseq.compiler.kernels.cached_attention import CachedAttention
from edgeseq.compiler.kernels.causal_conv import CausalConv
from edgeseq.compiler.kernels.copy import Copy
from edgeseq.compiler.kernels.embed import Embed
from edgeseq.compiler.kernels.glu import Glu
from edgeseq.compiler.kernels.layer_norm import LayerNorm
from edgeseq.compiler.kernels.linear import Linear
from edgeseq.compiler.kernels.rms_norm import RmsNorm
from edgeseq.compiler.kernels.rotary import Rotary
from edgeseq.compiler.kernels.selective_scan import SelectiveScan


class _Sizes:
    """A seeded generator of sizes, one per kernel, so that a variant does not depend on the others."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def below(self, high: int, low: int = 1) -> int:
        return int(self.rng.integers(low, high + 1))

    def coin(self) -> bool:
        return bool(self.rng.integers(2))

    def apart(self, width: int) -> int:
        """Floats between rows: the width, or a little more."""
        return width + (self.below(9) if self.coin() else 0)


def linears() -> list[Linear]:
    size = _Sizes(1)
    found = [
        Linear(T=1, M=1, K=1, ldx=1),
        Linear(T=1, M=16, K=7, ldx=7, bias=True),
        Linear(T=1, M=17, K=8, ldx=8, act="silu", residual=True, ldr=17),
        Linear(T=1, M=100, K=97, ldx=97, wdtype="float16"),
        Linear(T=5, M=33, K=19, ldx=24, wdtype="bfloat16", bias=True),
        Linear(T=1, M=48, K=40, ldx=40, wdtype="bfloat16"),
        Linear(T=1, M=50, K=43, ldx=43, wdtype="float16", chains=2),
        Linear(T=1, M=333, K=43, ldx=43, streams=3, ahead=True),
        Linear(T=1, M=333, K=32, ldx=32, wdtype="bfloat16", bias=True, streams=2),
        Linear(T=12, M=64, K=31, ldx=31, act="silu", bias=True),
        Linear(T=13, M=64, K=31, ldx=40, residual=True, ldr=70),
        Linear(T=20, M=49, K=16, ldx=16, tile=(6, 1)),
    ]
    for _ in range(14):
        m, k, residual = size.below(130), size.below(100), size.coin()
        found.append(
            Linear(
                T=size.below(20), M=m, K=k, ldx=size.apart(k), bias=size.coin(), residual=residual,
                ldr=size.apart(m) if residual else 0, act="silu" if size.coin() else "none",
                tile=(12, 2) if size.coin() else (6, 1),
            )
        )  # fmt: skip
    return found


def norms() -> list[RmsNorm]:
    size = _Sizes(2)
    found = [RmsNorm(1, 1, 1, 1e-5, True), RmsNorm(2, 16, 16, 1e-6, False), RmsNorm(3, 15, 20, 1e-3, True)]
    widths = [size.below(200) for _ in range(6)]
    return found + [RmsNorm(size.below(20), d, size.apart(d), 1e-5, size.coin()) for d in widths]


def layer_norms() -> list[LayerNorm]:
    size = _Sizes(7)
    found = [LayerNorm(1, 1, 1, 1e-5, True, True), LayerNorm(6, 16, 16, 1e-6), LayerNorm(4, 1030, 1031, 1e-5, True)]
    widths = [size.below(200) for _ in range(5)]
    return found + [LayerNorm(size.below(20), d, size.apart(d), 1e-5, size.coin(), size.coin()) for d in widths]


def embeds() -> list[Embed]:
    size = _Sizes(3)
    found = [Embed(1, 1, 1), Embed(3, 1009, 96), Embed(2, 33, 5, "float16"), Embed(2, 33, 5, "bfloat16")]
    return found + [Embed(size.below(20), size.below(100), size.below(70)) for _ in range(3)]


def convs() -> list[CausalConv]:
    size = _Sizes(4)
    found = [
        CausalConv(1, 16, 4, 16, True, True),
        CausalConv(4, 5, 1, 5, True, False),
        CausalConv(1, 67, 2, 67, False, False),
    ]
    widths = [size.below(150) for _ in range(8)]
    return found + [
        CausalConv(size.below(20), c, size.below(5, 2), size.apart(c), size.coin(), size.coin()) for c in widths
    ]


def scans() -> list[SelectiveScan]:
    size = _Sizes(5)
    plain = {"ldu": 33, "lddt": 33, "ldB": 4, "ldC": 4, "ldz": 33}
    found = [
        SelectiveScan(1, 1, 1, 1, 1, 1, 1),
        SelectiveScan(2, 33, 4, **plain, skip=True, gate=True, dt_bias=True),
        SelectiveScan(5, 33, 4, **plain, dt_softplus=False),
        SelectiveScan(5, 33, 4, **plain, dt_bias=True, dt_min=0.02, dt_max=0.5),
        SelectiveScan(5, 33, 4, **plain, gate=True, dt_max=0.3),
        SelectiveScan(1, 557, 6, 557, 560, 8, 6, 560, skip=True, gate=True, dt_bias=True),
    ]
    for _ in range(8):
        d, n, gate = size.below(100), size.below(17), size.coin()
        found.append(
            SelectiveScan(
                size.below(20), d, n, size.apart(d), size.apart(d), size.apart(n), size.apart(n),
                size.apart(d) if gate else 0, size.coin(), gate, size.coin(), dt_max=math.inf,
            )
        )  # fmt: skip
    return found


def glus() -> list[Glu]:
    size = _Sizes(6)
    found = [Glu(1, 1, 1, 1), Glu(2, 1600, 3200, 3200), Glu(1, 31, 31, 31)]
    widths = [size.below(200) for _ in range(4)]
    return found + [Glu(size.below(20), m, size.apart(m), size.apart(m)) for m in widths]


def rotaries() -> list[Rotary]:
    size = _Sizes(7)
    found = [Rotary(1, 1, 2, 2, False), Rotary(3, 2, 64, 128, True)]
    for _ in range(6):
        h, d = size.below(6), 2 * size.below(40)
        found.append(Rotary(size.below(20), h, d, size.apart(h * d), size.coin()))
    return found


def attentions() -> list[CachedAttention]:
    size = _Sizes(8)
    found = [
        CachedAttention(1, 1, 1, 1, 1, 1, 1, 1, 1.0),
        CachedAttention(1, 9, 3, 10, 150, 90, 30, 30, 0.3),
        CachedAttention(7, 4, 4, 64, 130, 256, 256, 256, 0.125),
    ]
    for _ in range(7):
        kv, t = size.below(3), size.below(20)
        h, d = kv * size.below(4), size.below(40)
        widths = (size.apart(h * d), size.apart(kv * d), size.apart(kv * d))
        found.append(CachedAttention(t, h, kv, d, t + size.below(130, 0), *widths, float(d) ** -0.5))
    return found


def rings() -> list[CachedAttention]:
    size = _Sizes(9)
    found = [
        CachedAttention(1, 1, 1, 1, 1, 1, 1, 1, 1.0, True),
        CachedAttention(1, 9, 3, 10, 150, 90, 30, 30, 0.3, True),
        CachedAttention(9, 4, 2, 16, 4, 64, 32, 32, 0.25, True),
    ]
    for _ in range(3):
        kv, t = size.below(3), size.below(20)
        h, d = kv * size.below(4), size.below(40)
        widths = (size.apart(h * d), size.apart(kv * d), size.apart(kv * d))
        found.append(CachedAttention(t, h, kv, d, size.below(90), *widths, float(d) ** -0.5, True))
    return found


def copies() -> list[Copy]:
    return [Copy(1, "float32"), Copy(77, "float32"), Copy(5, "int64"), Copy(19, "bool"), Copy(33, "int32")]


EVERY = [
    *linears(),
    *norms(),
    *layer_norms(),
    *embeds(),
    *convs(),
    *scans(),
    *glus(),
    *rotaries(),
    *attentions(),
    *rings(),
    *copies(),
]
