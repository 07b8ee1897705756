"""y[R,D] = (x - mean) / sqrt(var + eps) * w[D] + b[D] (Ba et al. 2016); statistics in float32, the variance that of the
centred row, so that a large mean costs no precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, Expr, Kernel, horizontal_sum, kernel, let, load, local, pieces, splat, store
from ._quantise import BLOCK, OUTPUTS, blocks, clear_block, output_params, write_block

FLOATS_PER_BLOCK = 2048  # narrow rows (heads) share a block


@dataclass(frozen=True)
class LayerNorm:
    """R rows of D; ldx: floats between rows of x; quant: write int8 blocks for weights of
    this zero point instead of y (D a multiple of 32)."""

    R: int
    D: int
    ldx: int
    eps: float
    weight: bool = False
    bias: bool = False
    quant: int | None = None

    @property
    def args(self) -> tuple[str, ...]:
        optional = [a for a, on in (("w", self.weight), ("b", self.bias)) if on]
        return ("x", *optional, *(("y",) if self.quant is None else OUTPUTS))

    @property
    def rows(self) -> int:
        """Rows of one block."""
        most = max(1, min(self.R, FLOATS_PER_BLOCK // self.D))
        return next(n for n in range(most, 0, -1) if self.R % n == 0)


def build(name: str, p: LayerNorm) -> Built:
    sizes = {"x": ("float32", (p.R - 1) * p.ldx + p.D), "y": ("float32", p.R * p.D)}
    sizes |= {"w": ("float32", p.D), "b": ("float32", p.D)} | output_params(p.R, p.D)
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        with T.serial(p.rows) as i:
            _row(k, p, let(k.block * p.rows + i))
    return Built(k.func, p.R // p.rows)


def _row(k: Kernel, p: LayerNorm, r: Expr) -> None:
    row = let(r * p.ldx)
    mean = let(_mean(k, p, row, lambda x, lanes: x))
    variance = _mean(k, p, row, lambda x, lanes: (x - splat(mean, lanes)) * (x - splat(mean, lanes)))
    scale = let(T.float32(1.0) / T.sqrt(variance + T.float32(p.eps)))

    def normed(i: Expr, lanes: int) -> Expr:
        y = (load(k["x"], row + i, lanes) - splat(mean, lanes)) * splat(scale, lanes)
        y = y * load(k["w"], i, lanes) if p.weight else y
        return y + load(k["b"], i, lanes) if p.bias else y

    if p.quant is not None:
        _quantised(k, p, let(r * blocks(p.D)), normed)
        return
    whole = p.D // LANES
    if whole:
        with T.serial(whole) as i:
            store(k["y"], r * p.D + i * LANES, normed(i * LANES, LANES))
    for i, lanes in pieces(p.D)[whole:]:
        store(k["y"], r * p.D + i, normed(i, lanes), lanes)


def _mean(k: Kernel, p: LayerNorm, row: Expr, term: Callable[[Expr, int], Expr]) -> Expr:
    """Mean of term(x) over a row."""
    acc, scratch, whole = local(LANES), local(LANES), p.D // LANES
    store(acc, 0, splat(0.0))
    if whole:
        with T.serial(whole) as i:
            x = let(load(k["x"], row + i * LANES))
            store(acc, 0, load(acc, 0) + term(x, LANES))
    for i, lanes in pieces(p.D)[whole:]:
        x = let(load(k["x"], row + i, lanes))
        store(acc, 0, load(acc, 0, lanes) + term(x, lanes), lanes)
    return horizontal_sum(scratch, load(acc, 0)) * T.float32(1.0 / p.D)


def _quantised(k: Kernel, p: LayerNorm, first: Expr, normed: Callable[[Expr, int], Expr]) -> None:
    """The normed row as int8 blocks from number `first` on."""
    with T.serial(p.D // BLOCK) as b:
        low, high = (let(normed(b * BLOCK + half, LANES)) for half in (0, LANES))
        write_block(k, first + b, low, high, p.quant or 0)
    for b in range(p.D // BLOCK, blocks(p.D)):
        clear_block(k, first + b)
