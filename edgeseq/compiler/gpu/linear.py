"""y[T,M] = act(x[T,K] W[M,K]^T + bias[M]) + residual[T,M], weights packed `rows16` (see kernels/linear).

T = 1: a block has 16 rows; its threads stream the rows' weights in words of 16 bytes (4 or 8 rows of one k), and the
partial sums meet in the end. T > 1: a block has a tile of 64 rows x 64 tokens; slices of both pass through shared
memory, and a thread keeps 4 x 4 sums in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..kernels.linear import Linear
from ..tvm_api import T
from . import Built
from ._emit import (
    Buffer,
    Expr,
    Kernel,
    await_inputs,
    f32,
    kernel,
    let,
    local,
    power_of_two,
    reduce_rows,
    shared,
    silu,
    store,
    strided,
    sync,
    unpack,
    when,
    words,
    zero,
)

ROWS = 16
UNROLL = 4
TILE = 64
SLICE = 16
GEMM_THREADS = 256


def build(name: str, p: Linear, gpu: Any) -> Built:
    groups = -(-p.M // ROWS)
    per_word = 1 if p.wdtype == "float32" else 2
    sizes = {
        "x": ("float32", (p.T - 1) * p.ldx + p.K),
        "w": _weights(p, groups * p.K * ROWS // per_word),
        "bias": ("float32", p.M),
        "residual": ("float32", (p.T - 1) * p.ldr + p.M),
        "y": ("float32", p.T * p.M),
    }
    params = [(a, *sizes[a]) for a in p.args]
    if p.T == 1:
        threads = gemv_threads(gpu, groups, p.K * ROWS * 4 // per_word)
        with kernel(name, params, groups, threads, gpu, early=True) as k:
            _gemv(k, p, per_word)
        return Built(k.func, groups, threads)
    grid = -(-p.M // TILE) * -(-p.T // TILE)
    with kernel(name, params, grid, GEMM_THREADS, gpu) as k:
        gemm(k, p, per_word)
    return Built(k.func, grid, GEMM_THREADS)


def _weights(p: Linear, count: int) -> tuple[str, int]:
    """dtype and elements of the packed weights, `count` words: a GEMV reads them four at a time."""
    return ("uint32x4", count // 4) if p.T == 1 else ("uint32", count)


def gemv_threads(gpu: Any, groups: int, group_bytes: int) -> int:
    """Threads of a block: enough that all blocks together keep the memory busy, not more than there are words."""
    most = min(gpu.threads, 1024)
    wanted = 128 if groups >= 512 else 256 if groups >= 128 else 1024
    return max(32, min(most, wanted, power_of_two(group_bytes // 16)))


def _gemv(k: Kernel, p: Linear, per_word: int) -> None:
    each = 4 * per_word  # rows of a 16-byte word quartet
    across = ROWS // each
    stride = k.threads // across  # k advanced by the block at a time
    acc = local(each)
    zero(acc, each)
    first = k.thread // across
    base = let(k.block * (p.K * across) + k.thread % across)

    def ask(raw: Buffer, start: Expr, count: int) -> None:
        for u in range(count):
            words(k["w"], base + (start + u * stride + first) * across, raw, 4 * u)

    def use(raw: Buffer, start: Expr, count: int) -> None:
        for u in range(count):
            x = let(k["x"][start + u * stride + first])
            values = [v for w in range(4) for v in unpack(raw[4 * u + w], p.wdtype)]
            for r, v in enumerate(values):
                store(acc, r, acc[r] + v * x)

    stream(k, p.K, stride, UNROLL, first, ask, use)
    total = reduce_rows(k, acc, each, across, shared(k.threads * each))
    row = k.block * ROWS + k.thread
    with when(k.thread < ROWS if p.M % ROWS == 0 else T.And(k.thread < ROWS, row < p.M)):
        epilogue(k, p, let(total(k.thread)), 0, row)


def stream(
    k: Kernel,
    count: int,
    stride: int,
    unroll: int,
    first: Expr,
    ask: Callable[[Buffer, Expr, int], None],
    use: Callable[[Buffer, Expr, int], None],
) -> None:
    """Elements first, first + stride, ... below `count`: `unroll` at a time are asked for together, then used.

    The first of them are asked for before the launch before this one is complete: they are weights.
    """
    full, rest = divmod(count, stride)
    raw = local(4 * unroll, "uint32")
    begin = min(full, unroll)
    ask(raw, 0, begin)
    await_inputs()
    use(raw, 0, begin)
    batches, single = divmod(full - begin, unroll)
    if batches:
        with T.serial(batches) as i:
            start = (i * unroll + begin) * stride
            ask(raw, start, unroll)
            use(raw, start, unroll)
    if single:
        start = (batches * unroll + begin) * stride
        ask(raw, start, single)
        use(raw, start, single)
    if rest:
        with when(first < rest):
            ask(raw, full * stride, 1)
            use(raw, full * stride, 1)


def epilogue(k: Kernel, p: Any, y: Expr, t: Expr, row: Expr) -> None:
    if p.bias:
        y = y + k["bias"][row]
    if p.act == "silu":
        y = silu(let(y))
    if p.residual:
        y = y + k["residual"][t * p.ldr + row]
    store(k["y"], t * p.M + row, y)


def gemm(k: Kernel, p: Linear, per_word: int) -> None:
    """Thread (i, j) of 16 x 16 has rows 4i..4i+3 and tokens j, j+16, j+32, j+48 of the tile."""
    tiles = -(-p.M // TILE)
    first_row, first_token = let(k.block % tiles * TILE), let(k.block // tiles * TILE)
    w, x = shared(SLICE * TILE), shared(SLICE * (TILE + 1))
    acc = local(16)
    zero(acc, 16)
    i, j = let(k.thread // 16), let(k.thread % 16)

    def slice_(start: Expr, depth: int) -> None:
        sync()
        _load_weights(k, p, w, first_row, start, depth, per_word)
        _load_tokens(k, p, x, first_token, start, depth)
        sync()
        with T.serial(depth) as d:
            wr, xr = local(4), local(4)
            for r in range(4):
                store(wr, r, w[d * TILE + i * 4 + r])
                store(xr, r, x[d * (TILE + 1) + j + 16 * r])
            for r in range(4):
                for c in range(4):
                    store(acc, r * 4 + c, acc[r * 4 + c] + wr[r] * xr[c])

    if p.K // SLICE:
        with T.serial(p.K // SLICE) as s:
            slice_(s * SLICE, SLICE)
    if p.K % SLICE:
        slice_(p.K // SLICE * SLICE, p.K % SLICE)
    finish_tile(k, p, acc, first_row, first_token, i, j)


def finish_tile(k: Kernel, p: Any, acc: Buffer, first_row: Expr, first_token: Expr, i: Expr, j: Expr) -> None:
    for r in range(4):
        for c in range(4):
            row, token = first_row + i * 4 + r, first_token + j + 16 * c
            with when(T.And(row < p.M, token < p.T)):
                epilogue(k, p, acc[r * 4 + c], token, row)


def _load_weights(k: Kernel, p: Linear, w: Buffer, first_row: Expr, start: Expr, depth: int, per_word: int) -> None:
    """w[d][row of the tile]; rows beyond the padded end are zero."""
    line = ROWS // per_word  # words of 16 rows at one k
    groups = -(-p.M // ROWS)

    def one(n: Expr) -> None:
        group, rest = n // (depth * line), n % (depth * line)
        d, at = rest // line, rest % line
        g = first_row // ROWS + group
        raw = local(1, "uint32")
        store(raw, 0, T.uint32(0))
        with when(g < groups):
            store(raw, 0, k["w"][(g * p.K + start + d) * line + at])
        for e, v in enumerate(unpack(raw[0], p.wdtype)):
            store(w, d * TILE + group * ROWS + at * per_word + e, v)

    strided(k, TILE // ROWS * depth * line, one)


def _load_tokens(k: Kernel, p: Linear, x: Buffer, first_token: Expr, start: Expr, depth: int) -> None:
    """x[d][token of the tile]; tokens beyond the end are zero."""

    def one(n: Expr) -> None:
        token, d = n // depth, n % depth
        value = local(1)
        store(value, 0, f32(0.0))
        with when(first_token + token < p.T):
            store(value, 0, k["x"][(first_token + token) * p.ldx + start + d])
        store(x, d * (TILE + 1) + token, value[0])

    strided(k, TILE * depth, one)
