"""y[T,M] = silu(g[T,M]) u[T,M] (Shazeer 2020, SwiGLU), as floats or as int8 blocks for the product that follows."""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, Expr, kernel, let, load, pieces, silu, store
from ._quantise import BLOCK, OUTPUTS, blocks, output_params, write_block

COLUMNS_PER_BLOCK = 512


@dataclass(frozen=True)
class Glu:
    """T rows of M; ldg, ldu: floats between rows. quant: write int8 blocks for weights of this zero point instead of
    y (M a multiple of 64)."""

    T: int
    M: int
    ldg: int
    ldu: int
    quant: int | None = None

    @property
    def args(self) -> tuple[str, ...]:
        return ("g", "u", *(("y",) if self.quant is None else OUTPUTS))

    @property
    def strips(self) -> int:
        """Blocks of one row: equal parts of whole quantised pairs, or the row itself."""
        pairs = self.M // (2 * BLOCK) if self.M % (2 * BLOCK) == 0 else 1
        limit = max(1, self.M // COLUMNS_PER_BLOCK)
        return next(n for n in range(min(limit, pairs), 0, -1) if pairs % n == 0)


def build(name: str, p: Glu) -> Built:
    sizes = {"g": ("float32", (p.T - 1) * p.ldg + p.M), "u": ("float32", (p.T - 1) * p.ldu + p.M)}
    sizes |= {"y": ("float32", p.T * p.M)} | output_params(p.T, p.M)
    width = p.M // p.strips
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        t, first = let(k.block // p.strips), let(k.block % p.strips * width)

        def gated(i: Expr, lanes: int) -> Expr:
            g = let(load(k["g"], t * p.ldg + first + i, lanes))
            return silu(g) * load(k["u"], t * p.ldu + first + i, lanes)

        if p.quant is not None:
            with T.serial(width // BLOCK) as b:
                low, high = (let(gated(b * BLOCK + half, LANES)) for half in (0, LANES))
                write_block(k, t * blocks(p.M) + first // BLOCK + b, low, high, p.quant)
        else:
            with T.serial(width // LANES) as i:
                store(k["y"], t * p.M + first + i * LANES, gated(i * LANES, LANES))
            for i, lanes in pieces(width)[width // LANES :]:
                store(k["y"], t * p.M + first + i, gated(i, lanes), lanes)
    return Built(k.func, p.T * p.strips)
