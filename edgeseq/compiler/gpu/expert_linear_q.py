"""The product of `expert_linear` with 4- or 8-bit weights in blocks of 32 and int8 activations, as `linear_q` has them.

16 lines of threads share out the blocks; a line's part of a row is exact in int32 within a block.
"""

from __future__ import annotations

from typing import Any

from ..kernels._quantise import BLOCK, blocks
from ..kernels.expert_linear import common_sizes
from ..kernels.expert_linear_q import ExpertLinearQ
from ..kernels.linear_q import PAIR_BYTES
from ..tvm_api import T
from . import Built
from ._emit import Buffer, Expr, Kernel, blocks_of, half, kernel, let, local, loop, store, when
from .expert_linear import LINES, ROWS, Experts, grid_of
from .linear_q import _high, _low, dp4a


def build(name: str, p: ExpertLinearQ, gpu: Any) -> Built:
    n, rows = blocks(p.K), p.T * p.S
    weight_bytes = p.E * p.groups * (n // 2) * PAIR_BYTES[p.bits]
    sizes = common_sizes(p) | {
        "q": ("int32", rows * n * BLOCK // 4),
        "scale": ("float32", rows * n),
        "offset": ("int32", rows * n),
        "w": ("int32", weight_bytes // 4),
        "ws": ("uint16", weight_bytes // 2),
    }
    grid = grid_of(p)
    with kernel(name, [(a, *sizes[a]) for a in p.args], grid, ROWS * LINES, gpu) as k:
        Experts(k, p, lambda acc, group, x, gates: _product(k, p, acc, group, x, gates)).run()
    return Built(k.func, grid, ROWS * LINES)


def _product(k: Kernel, p: ExpertLinearQ, acc: Buffer, group: Expr, rows: list[Expr], gates: list[Expr]) -> None:
    """acc[i] += gates[i] times the line's blocks of the thread's row of `group` times x[rows[i]]."""
    n, pair = blocks(p.K), PAIR_BYTES[p.bits] // 4
    lane, line = k.thread % ROWS, k.thread // ROWS
    base = let(group * (n // 2 * pair))
    starts = [let(row * n) for row in rows]
    words = p.bits  # of 4 codes, or of 8 in 4 bits

    def block(b: Expr) -> None:
        at = let(base + b // 2 * pair)
        raw = local(words, "int32")
        for i in range(words):
            store(raw, i, k["w"][at + 16 + b % 2 * (words * ROWS) + i * ROWS + lane])
        scale = let(half(T.Cast("uint32", k["ws"][at * 2 + b % 2 * ROWS + lane])))
        for i, start in enumerate(starts):
            x = let(start + b)
            total = local(1, "int32")
            store(total, 0, k["offset"][x])
            for g in range(words):
                low = raw[g] if p.bits == 8 else _low(raw[g])
                store(total, 0, dp4a(low, k["q"][x * 8 + g], total[0]))
                if p.bits == 4:
                    store(total, 0, dp4a(_high(raw[g]), k["q"][x * 8 + g + 4], total[0]))
            a = scale * k["scale"][x]
            store(acc, i, acc[i] + T.Cast("float32", total[0]) * (a * gates[i] if gates else a))

    def some(i: Expr) -> None:
        b = let(i * LINES + line)
        with when(True if n % LINES == 0 else b < n):
            block(b)

    loop(blocks_of(n, LINES), some)
