"""y[R,D] = x[R,D] / sqrt(mean(x^2) + eps) * w[D]; statistics in float32 (Zhang and Sennrich 2019, eq. 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, Expr, Kernel, horizontal_sum, kernel, let, load, local, pieces, splat, store
from ._quantise import BLOCK, OUTPUTS, blocks, clear_block, output_params, write_block


@dataclass(frozen=True)
class RmsNorm:
    """R rows of D; ldx: floats between rows of x; quant: write int8 blocks for weights of
    this zero point instead of y (D a multiple of 32)."""

    R: int
    D: int
    ldx: int
    eps: float
    weight: bool
    quant: int | None = None

    @property
    def args(self) -> tuple[str, ...]:
        return ("x", *(("w",) if self.weight else ()), *(("y",) if self.quant is None else OUTPUTS))


def build(name: str, p: RmsNorm) -> Built:
    sizes = {"x": ("float32", (p.R - 1) * p.ldx + p.D), "w": ("float32", p.D), "y": ("float32", p.R * p.D)}
    sizes |= output_params(p.R, p.D)
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        whole, rest = divmod(p.D, LANES)
        acc = local(LANES)
        scratch = local(LANES)
        store(acc, 0, splat(0.0))
        row = let(k.block * p.ldx)
        if whole:
            with T.serial(whole) as i:
                v = let(load(k["x"], row + i * LANES))
                store(acc, 0, load(acc, 0) + v * v)
        if rest:
            v = let(load(k["x"], row + whole * LANES, rest))
            store(acc, 0, load(acc, 0, rest) + v * v, rest)
        total = horizontal_sum(scratch, load(acc, 0))
        scale = let(T.float32(1.0) / T.sqrt(total * T.float32(1.0 / p.D) + T.float32(p.eps)))

        def normed(i: Expr, lanes: int) -> Expr:
            y = load(k["x"], row + i, lanes) * splat(scale, lanes)
            return y * load(k["w"], i, lanes) if p.weight else y

        if p.quant is not None:
            _quantised(k, p, normed)
        else:
            if whole:
                with T.serial(whole) as i:
                    store(k["y"], k.block * p.D + i * LANES, normed(i * LANES, LANES))
            for i, lanes in pieces(p.D)[whole:]:
                store(k["y"], k.block * p.D + i, normed(i, lanes), lanes)
    return Built(k.func, p.R)


def _quantised(k: Kernel, p: RmsNorm, normed: Callable[[Expr, int], Expr]) -> None:
    """The normed row as int8 blocks."""
    first = let(k.block * blocks(p.D))
    with T.serial(p.D // BLOCK) as b:
        low, high = (let(normed(b * BLOCK + half, LANES)) for half in (0, LANES))
        write_block(k, first + b, low, high, p.quant or 0)
    for b in range(p.D // BLOCK, blocks(p.D)):
        clear_block(k, first + b)
