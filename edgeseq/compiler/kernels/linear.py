"""y[T,M] = act(x[T,K] W[M,K]^T + bias[M]) + residual[T,M].

W is packed `rows16`: [ceil(M/16)][K][16], so 16 output rows fill one vector and the weights of a block are one
contiguous stream. T = 1 is a GEMV bound by reading W; T > 1 is a GEMM whose accumulators (tokens x rows) stay in
registers while W is reused across tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..tvm_api import PrimFunc, T
from . import Built
from ._emit import LANES, Buffer, Expr, Kernel, kernel, let, load, local, prefetch, silu, splat, split_blocks, store
from ._tiles import accumulators, most_streams, streams, variants

if TYPE_CHECKING:
    from ..targets import Target


@dataclass(frozen=True)
class Linear:
    """Parameters of one variant. ldx, ldr: floats between consecutive tokens of x and of the residual.

    tile: (tokens, row groups) held in registers by the GEMM.
    streams: row groups that a block of the GEMV reads in turns. ahead: several are asked for before they are needed.
    chains: sums of 16 rows that the GEMV keeps, of all streams together.
    """

    T: int
    M: int
    K: int
    ldx: int
    wdtype: str = "float32"
    bias: bool = False
    residual: bool = False
    ldr: int = 0
    act: str = "none"
    tile: tuple[int, int] = (12, 2)
    streams: int = 1
    ahead: bool = False
    chains: int = 8

    @property
    def args(self) -> tuple[str, ...]:
        return ("x", "w", *(("bias",) if self.bias else ()), *(("residual",) if self.residual else ()), "y")


GEMV_UNROLL = 8
LINE = 64
AHEAD = 1088
"""Bytes that a GEMV of several streams asks for ahead in each, into the first cache."""


def candidates(p: Linear, target: Target) -> list[Linear]:
    """What tuning may choose from: streams of the GEMV, tiles of the GEMM."""
    groups = -(-p.M // LANES)
    return streams(p, groups) if p.T == 1 else variants(p, p.T, groups, accumulators(target.features))


def build(name: str, p: Linear) -> Built:
    groups = -(-p.M // LANES)
    sizes = {
        "x": ("float32", (p.T - 1) * p.ldx + p.K),
        "w": (_storage(p.wdtype), groups * p.K * LANES),
        "bias": ("float32", p.M),
        "residual": ("float32", (p.T - 1) * p.ldr + p.M),
        "y": ("float32", p.T * p.M),
    }
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        form = _gemv if p.T == 1 else _gemm
        grid = split_rows(k, groups, p, lambda mine: form(k, p, groups, mine))
    return Built(k.func, grid)


def _storage(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def _weights(w: Buffer, offset: Expr, dtype: str) -> Expr:
    """16 weights as float32."""
    raw = load(w, offset)
    if dtype == "float16":
        return T.Cast("float32x16", raw)
    if dtype == "bfloat16":
        return T.reinterpret("float32x16", T.Cast("uint32x16", raw) << T.broadcast(T.uint32(16), LANES))
    return raw


def split_rows(k: Kernel, groups: int, p: Any, body: Callable[[list[Expr]], None]) -> int:
    """Emit `body(its groups of 16 rows)` for every block. Returns the grid.

    A block of a GEMM has p.tile[1] neighbours. Of a GEMV the rows are cut into p.streams ranges, and block b has number
    b of each: what a thread reads goes on from block to block, as prefetchers expect.
    """
    if p.T > 1:
        return split_blocks(k.block, groups, p.tile[1], lambda first, n: body([first + r for r in range(n)]))
    ranges = min(p.streams, most_streams(groups))
    while ranges * -(-groups // ranges) - groups > -(-groups // ranges):  # only the last one may be shorter
        ranges -= 1
    length = -(-groups // ranges)
    missing = ranges * length - groups

    def block(n: int) -> None:
        body([k.block + r * length for r in range(n)])

    if not missing:
        block(ranges)
    else:
        with T.If(k.block < length - missing):
            with T.Then():
                block(ranges)
            with T.Else():
                block(ranges - 1)
    return length


def _gemv(k: Kernel, p: Linear, groups: int, mine: list[Expr]) -> None:
    """One block = a group of 16 rows of each stream; independent accumulators hide the multiply-add's latency."""
    rows = len(mine)
    unroll = GEMV_UNROLL if p.K >= GEMV_UNROLL else 1
    chains = max(1, min(unroll, p.chains) // rows)
    acc = local(rows * chains * LANES)
    for i in range(rows * chains):
        store(acc, i * LANES, splat(0.0))
    bases = [let(group * (p.K * LANES)) for group in mine]

    def term(i: Expr, r: int, chain: int) -> None:
        product = _weights(k["w"], bases[r] + i * LANES, p.wdtype) * splat(k["x"][i])
        at = (r * chains + chain) * LANES
        store(acc, at, load(acc, at) + product)

    size = 4 if p.wdtype == "float32" else 2
    with T.serial(p.K // unroll) as step:
        for r in range(rows):
            for u in range(unroll):
                if p.ahead and rows > 1 and u * LANES * size % LINE == 0:
                    prefetch(k["w"], bases[r] + (step * unroll + u) * LANES + AHEAD // size)
                term(step * unroll + u, r, u % chains)
    for i in range(p.K // unroll * unroll, p.K):
        for r in range(rows):
            term(i, r, 0)
    for r, group in enumerate(mine):
        _fold(acc, r * chains, chains)
        guard_tail(group, groups, p.M, _finish(k, p, acc, r * chains * LANES, 0, group))


def _fold(acc: Buffer, first: int, chains: int) -> None:
    """The sum of `chains` vectors, a power of two or not, into the first."""
    while chains > 1:
        half = chains // 2
        for u in range(half):
            at = (first + u) * LANES
            store(acc, at, load(acc, at) + load(acc, at + (chains - half) * LANES))
        chains -= half


def _gemm(k: Kernel, p: Linear, groups: int, mine: list[Expr]) -> None:
    """One block = some groups of 16 rows for all tokens, in tiles of tokens."""
    rows = len(mine)
    step = -(-p.T // -(-p.T // p.tile[0]))
    acc = local(step * rows * LANES)
    for t0 in range(0, p.T, step):
        tokens = min(step, p.T - t0)
        for i in range(tokens * rows):
            store(acc, i * LANES, splat(0.0))
        with T.serial(p.K) as i:
            w = [let(_weights(k["w"], (group * p.K + i) * LANES, p.wdtype)) for group in mine]
            for t in range(tokens):
                x = let(splat(k["x"][(t0 + t) * p.ldx + i]))
                for r in range(rows):
                    at = (t * rows + r) * LANES
                    store(acc, at, load(acc, at) + w[r] * x)
        for t in range(tokens):
            for r, group in enumerate(mine):
                at = (t * rows + r) * LANES
                guard_tail(group, groups, p.M, _finish(k, p, acc, at, t0 + t, group))


def _finish(k: Kernel, p: Linear, acc: Buffer, at: int, t: int, group: Expr) -> Callable[[int], None]:
    return lambda lanes: epilogue(k, p, acc, at, t, group * LANES, lanes)


def guard_tail(group: Expr, groups: int, rows: int, body) -> None:  # type: ignore[no-untyped-def]
    """The last group of 16 rows may be partly padding: store only the real rows."""
    rest = rows % LANES
    if not rest:
        body(LANES)
        return
    with T.If(group < groups - 1):
        with T.Then():
            body(LANES)
        with T.Else():
            body(rest)


def epilogue(k: Kernel, p: Any, acc: Buffer, at: Expr, t: Expr, row: Expr, lanes: int) -> None:
    y = load(acc, at, lanes)
    if p.bias:
        y = y + load(k["bias"], row, lanes)
    if p.act == "silu":
        y = silu(let(y))
    if p.residual:
        y = y + load(k["residual"], t * p.ldr + row, lanes)
    store(k["y"], t * p.M + row, y, lanes)


__all__ = ["Linear", "PrimFunc", "build"]
