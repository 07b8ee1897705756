"""y[T,K] = s (u - zero) of row token[t] from the packed table of linear_q."""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, kernel, let
from ._quantise import BLOCK, blocks
from .linear_q import PAIR_BYTES


@dataclass(frozen=True)
class EmbedQ:
    """M rows of K in 4 or 8 bits; signed: 8-bit codes are stored as s8. The caller has checked 0 <= token < M."""

    T: int
    M: int
    K: int
    bits: int
    signed: bool
    args = ("tokens", "w", "ws", "y")


def build(name: str, p: EmbedQ) -> Built:
    pairs = blocks(p.K) // 2
    size = -(-p.M // LANES) * pairs * PAIR_BYTES[p.bits]
    params = [("tokens", "int64", p.T), ("w", "uint8", size), ("ws", "float16", size // 2), ("y", "float32", p.T * p.K)]
    with kernel(name, params) as k:
        row = let(T.Cast("int32", k["tokens"][k.block]))
        lane = let(row % LANES)
        base = let((row // LANES) * (pairs * PAIR_BYTES[p.bits]))
        with T.serial(p.K) as i:
            pair = i // (2 * BLOCK)
            half, within = i // BLOCK % 2, i % BLOCK
            at = base + pair * PAIR_BYTES[p.bits]
            scale = T.Cast("float32", k["ws"][at // 2 + half * LANES + lane])
            group, of4 = within // 4, within % 4
            if p.bits == 4:
                byte = T.Cast("int32", k["w"][at + 64 + half * 256 + group % 4 * 64 + lane * 4 + of4])
                code = ((byte >> (group // 4 * 4)) & 15) - 8
            else:
                byte = T.Cast("int32", k["w"][at + 64 + half * 512 + group * 64 + lane * 4 + of4])
                code = ((byte << 24) >> 24) if p.signed else byte - 128
            T.buffer_store(k["y"], T.Cast("float32", code) * scale, [k.block * p.K + i])
    return Built(k.func, p.T)
