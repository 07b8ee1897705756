"""y[T,K] = s (u - zero) of row token[t] from the packed table of linear_q: a thread per number."""

from __future__ import annotations

from typing import Any

from ..kernels._quantise import BLOCK, blocks
from ..kernels.embed_q import EmbedQ
from ..kernels.linear_q import PAIR_BYTES
from ..tvm_api import T
from . import Built
from ._emit import Expr, blocks_of, elementwise, half, kernel, let, store

THREADS = 128
ROWS = 16


def build(name: str, p: EmbedQ, gpu: Any) -> Built:
    pairs, pair = blocks(p.K) // 2, PAIR_BYTES[p.bits]
    size = -(-p.M // ROWS) * pairs * pair
    params = [("tokens", "int64", p.T), ("w", "uint8", size), ("ws", "uint16", size // 2), ("y", "float32", p.T * p.K)]
    grid = blocks_of(p.T * p.K, THREADS)
    with kernel(name, params, grid, THREADS, gpu) as k:

        def one(index: Expr) -> None:
            i = let(index % p.K)
            row = let(T.Cast("int32", k["tokens"][index // p.K]))
            lane, block, group = let(row % ROWS), let(i // BLOCK % 2), let(i % BLOCK // 4)
            at = let(row // ROWS * (pairs * pair) + i // (2 * BLOCK) * pair)
            scale = half(T.Cast("uint32", k["ws"][at // 2 + block * ROWS + lane]))
            if p.bits == 4:
                byte = T.Cast("int32", k["w"][at + 64 + block * 256 + group % 4 * 64 + lane * 4 + i % 4])
                code = ((byte >> (group // 4 * 4)) & 15) - 8
            else:
                byte = T.Cast("int32", k["w"][at + 64 + block * 512 + group * 64 + lane * 4 + i % 4])
                code = ((byte << 24) >> 24) if p.signed else byte - 128
            store(k["y"], index, T.Cast("float32", code) * scale)

        elementwise(k, grid * THREADS, p.T * p.K, one)
    return Built(k.func, grid, THREADS)
