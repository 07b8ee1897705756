"""The parts of a step of attention brought together: o = sum_i e^(m_i-M) acc_i / sum_i e^(m_i-M) l_i, M = max_i m_i.

part[h, i] is what the i-th range of rows left for head h: accumulator, maximum and sum (cached_attention, parts). A
range without rows has l = 0 and the least maximum, and weighs nothing. One block = some heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, Expr, kernel, let, load, local, loop, pieces, splat, split_blocks, store
from ._quantise import BLOCK, OUTPUTS, output_params, write_block

HEADS_PER_BLOCK = 8


@dataclass(frozen=True)
class AttentionMerge:
    """H heads of width d, `parts` ranges of rows; quant: int8 blocks for weights of this zero point instead of o."""

    H: int
    d: int
    parts: int
    quant: int | None = None

    @property
    def args(self) -> tuple[str, ...]:
        return ("partial", *(("o",) if self.quant is None else OUTPUTS))

    @property
    def quantises(self) -> bool:
        """Whether it could write int8 blocks: they are whole within a head."""
        return self.d % BLOCK == 0


def sizes_of(p: AttentionMerge) -> dict[str, tuple[str, int]]:
    """dtype and elements of every argument by its name."""
    sizes = {"partial": ("float32", p.H * p.parts * (p.d + 2)), "o": ("float32", p.H * p.d)}
    return sizes | output_params(1, p.H * p.d)


def build(name: str, p: AttentionMerge) -> Built:
    stride = p.d + 2
    with kernel(name, [(a, *sizes_of(p)[a]) for a in p.args]) as k:
        partial, weights, best, whole = k["partial"], local(p.parts), local(1), local(1)

        def head(h: Expr) -> None:
            start = let(h * (p.parts * stride))
            T.buffer_store(best, partial[start + p.d], [0])
            for i in range(1, p.parts):
                T.buffer_store(best, T.max(best[0], partial[start + i * stride + p.d]), [0])
            T.buffer_store(whole, T.float32(0.0), [0])
            for i in range(p.parts):
                T.buffer_store(weights, T.exp(partial[start + i * stride + p.d] - best[0]), [i])
                T.buffer_store(whole, whole[0] + weights[i] * partial[start + i * stride + p.d + 1], [0])
            for i in range(p.parts):
                T.buffer_store(weights, weights[i] / whole[0], [i])

            def merged(c: int, lanes: int) -> Expr:
                total = splat(0.0, lanes)
                for i in range(p.parts):
                    total = total + splat(weights[i], lanes) * load(partial, start + i * stride + c, lanes)
                return total

            if p.quant is not None:
                for b in range(p.d // BLOCK):
                    low, high = (let(merged(b * BLOCK + i, LANES)) for i in (0, LANES))
                    write_block(k, h * (p.d // BLOCK) + b, low, high, p.quant)
                return
            for c, lanes in pieces(p.d):
                store(k["o"], h * p.d + c, merged(c, lanes), lanes)

        def some(first: Expr, count: int) -> None:
            loop(count, lambda h: head(let(first + h)))

        grid = split_blocks(k.block, p.H, HEADS_PER_BLOCK, some)
    return Built(k.func, grid)
