"""The parts of a step of attention brought together: o = sum_i e^(m_i-M) acc_i / sum_i e^(m_i-M) l_i, M = max_i m_i.

part[h, i] is what the i-th range of rows left for head h: accumulator, maximum and sum (cached_attention, parts). A
range without rows has l = 0 and the least maximum, and weighs nothing. One block = some heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import Expr, kernel, let, load, local, loop, pieces, splat, split_blocks, store

HEADS_PER_BLOCK = 8


@dataclass(frozen=True)
class AttentionMerge:
    """H heads of width d, `parts` ranges of rows."""

    H: int
    d: int
    parts: int
    args = ("partial", "o")


def build(name: str, p: AttentionMerge) -> Built:
    stride = p.d + 2
    with kernel(name, [("partial", "float32", p.H * p.parts * stride), ("o", "float32", p.H * p.d)]) as k:
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
            for c, lanes in pieces(p.d):
                total = splat(0.0, lanes)
                for i in range(p.parts):
                    total = total + splat(weights[i], lanes) * load(partial, start + i * stride + c, lanes)
                store(k["o"], h * p.d + c, total, lanes)

        def some(first: Expr, count: int) -> None:
            loop(count, lambda h: head(let(first + h)))

        grid = split_blocks(k.block, p.H, HEADS_PER_BLOCK, some)
    return Built(k.func, grid)
