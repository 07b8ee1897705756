"""y[T,M] = act(x[T,K] W[M,K]^T + bias[M]) + residual[T,M], weights packed `rows16` (see kernels/linear).

T = 1: a block has 16 rows; its threads stream the rows' weights in words of 16 bytes (4 or 8 rows of one k), and the
partial sums meet in the end. T > 1: a block has a tile of 64 rows x 64 tokens; slices of both pass through shared
memory, and a thread keeps 4 x 4 sums in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
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
    rows_scratch,
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


@dataclass(frozen=True)
class FusedLinear(Linear):
    """A product of one token with what stands before and behind it.

    norm:  x is divided by its root mean square first (see kernels/rms_norm), norm_weight: and multiplied by a weight.
    conv:  rows conv_at .. conv_at + conv_C - 1 of y pass through a causal convolution of `conv` taps with its state
           (see kernels/causal_conv) into yc; 0 is none.
    glu:   y = silu(x W^T) (x WU^T), two products of one shape (see kernels/glu).
    """

    norm: bool = False
    norm_weight: bool = False
    eps: float = 0.0
    conv: int = 0
    conv_at: int = 0
    conv_C: int = 0
    conv_bias: bool = False
    conv_silu: bool = False
    glu: bool = False

    @property
    def args(self) -> tuple[str, ...]:
        switches = (("wu", self.glu), ("bias", self.bias), ("residual", self.residual), ("norm_w", self.norm_weight))
        conv = ("conv_w", *(("conv_b",) if self.conv_bias else ()), "past", "yc") if self.conv else ()
        return ("x", "w", *(a for a, on in switches if on), *conv, "y")


ROWS = 16
UNROLL = 4
TILE = 64
SLICE = 16
GEMM_THREADS = 256


def build(name: str, p: Linear, gpu: Any) -> Built:
    params = parameters(p)
    if p.T == 1:
        groups = -(-p.M // ROWS)
        threads = gemv_threads(gpu, groups, group_bytes(p))
        with kernel(name, params, groups, threads, gpu, early=True) as k:
            run_gemv(k, Gemv(k, p))
        return Built(k.func, groups, threads)
    grid = -(-p.M // TILE) * -(-p.T // TILE)
    with kernel(name, params, grid, GEMM_THREADS, gpu) as k:
        gemm(k, p, _per_word(p))
    return Built(k.func, grid, GEMM_THREADS)


def parameters(p: Linear) -> list[tuple[str, str, int]]:
    """Name, dtype and elements of every argument."""
    groups = -(-p.M // ROWS)
    sizes = {
        "x": ("float32", (p.T - 1) * p.ldx + p.K),
        "w": _weights(p, groups * p.K * ROWS // _per_word(p)),
        "bias": ("float32", p.M),
        "residual": ("float32", (p.T - 1) * p.ldr + p.M),
        "y": ("float32", p.T * p.M),
    }
    if isinstance(p, FusedLinear):
        floats = {"norm_w": p.K, "conv_w": p.conv * p.conv_C, "conv_b": p.conv_C, "yc": p.conv_C}
        floats["past"] = max(1, p.conv - 1) * p.conv_C
        sizes |= {a: ("float32", n) for a, n in floats.items()} | {"wu": sizes["w"]}
    return [(a, *sizes[a]) for a in p.args]


def group_bytes(p: Linear) -> int:
    """Bytes of 16 rows of the weights."""
    return p.K * ROWS * 4 // _per_word(p)


def _per_word(p: Linear) -> int:
    return 1 if p.wdtype == "float32" else 2


def _weights(p: Linear, count: int) -> tuple[str, int]:
    """dtype and elements of the packed weights, `count` words: a GEMV reads them four at a time."""
    return ("uint32x4", count // 4) if p.T == 1 else ("uint32", count)


def gemv_threads(gpu: Any, groups: int, group_bytes: int) -> int:
    """Threads of a block: enough that all blocks together keep the memory busy, not more than there are words."""
    most = min(gpu.threads, 1024)
    wanted = 128 if groups >= 512 else 256 if groups >= 128 else 1024
    return max(32, min(most, wanted, power_of_two(group_bytes // 16)))


def run_gemv(k: Kernel, gemv: Any) -> None:
    """One product from its first word to its last store."""
    acc = local(gemv.each)
    zero(acc, gemv.each)
    gemv.accumulate(acc)
    gemv.finish(reduce_rows(k, acc, gemv.each, gemv.across, rows_scratch(k, gemv.each, gemv.across)))


class Gemv:
    """16 rows of a product of one token: sums of each thread, then, when they have met, what becomes of the rows."""

    def __init__(self, k: Kernel, p: Linear) -> None:
        self.k, self.p = k, p if isinstance(p, FusedLinear) else FusedLinear(**fields_of(p))
        self.rows = 4 * _per_word(p)  # of a 16-byte word quartet
        self.sources = ("w", "wu") if self.p.glu else ("w",)
        self.sums = self.rows * len(self.sources)
        self.each = self.sums + (1 if self.p.norm else 0)  # the sum of squares beside them
        self.across = ROWS // self.rows
        self.row = k.block * ROWS + k.thread
        self.mine = k.thread < ROWS if p.M % ROWS == 0 else T.And(k.thread < ROWS, self.row < p.M)
        self.conv = _Conv(k, self.p, self.row) if self.p.conv else None

    def accumulate(self, acc: Buffer) -> None:
        k, p, sources, across = self.k, self.p, self.sources, self.across
        stride = k.threads // across  # k advanced by the block at a time
        first = k.thread // across
        base = let(k.block * (p.K * across) + k.thread % across)
        if self.conv:
            self.conv.ask(self.mine)

        def ask(raw: Buffer, start: Expr, count: int) -> None:
            for u in range(count):
                for i, name in enumerate(sources):
                    at = base + (start + u * stride + first) * across
                    words(k[name], at, raw, 4 * (u * len(sources) + i))

        def use(raw: Buffer, start: Expr, count: int) -> None:
            for u in range(count):
                at = start + u * stride + first
                x = let(k["x"][at])
                if p.norm:
                    store(acc, self.sums, acc[self.sums] + x * x)
                if p.norm_weight:
                    x = let(x * k["norm_w"][at])
                held = range(4 * len(sources) * u, 4 * len(sources) * (u + 1))
                values = [v for w in held for v in unpack(raw[w], p.wdtype)]
                for r, v in enumerate(values):
                    store(acc, r, acc[r] + v * x)

        stream(k, p.K, stride, UNROLL // len(sources), first, ask, use, 4 * UNROLL)

    def finish(self, total: Callable[[Expr], Expr]) -> None:
        k, p, rows, each = self.k, self.p, self.rows, self.each
        with when(self.mine):
            at = let(k.thread // rows * each + k.thread % rows)
            scale = f32(1.0)
            if p.norm:
                scale = let(f32(1.0) / T.sqrt(total(self.sums) * f32(1.0 / p.K) + f32(p.eps)))
            y = let(total(at) * scale)
            if p.glu:
                y = let(silu(y) * (total(at + rows) * scale))
            y = let(settled(k, p, y, 0, self.row))
            store(k["y"], self.row, y)
            if self.conv:
                self.conv.write(y)


def fields_of(p: Any) -> dict[str, Any]:
    """The parameters of a kernel by name."""
    return {f.name: getattr(p, f.name) for f in fields(p)}


class _Conv:
    """The convolution of the row that this thread writes; taps and state are asked for ahead of everything else."""

    def __init__(self, k: Kernel, p: FusedLinear, row: Expr) -> None:
        self.k, self.p, self.channel = k, p, row - p.conv_at
        self.inside = T.And(self.channel >= 0, self.channel < p.conv_C)
        self.taps, self.window = local(p.conv), local(max(1, p.conv - 1))

    def ask(self, mine: Expr) -> None:
        p, k = self.p, self.k
        with when(T.And(mine, self.inside)):
            for j in range(p.conv):
                store(self.taps, j, k["conv_w"][j * p.conv_C + self.channel])
            for j in range(p.conv - 1):
                store(self.window, j, k["past"][j * p.conv_C + self.channel])

    def write(self, x: Expr) -> None:
        p, k = self.p, self.k
        with when(self.inside):
            y = self.taps[p.conv - 1] * x
            for j in range(p.conv - 1):
                y = y + self.taps[j] * self.window[j]
            y = let(y + k["conv_b"][self.channel] if p.conv_bias else y)
            store(k["yc"], self.channel, silu(y) if p.conv_silu else y)
            for j in range(p.conv - 2):
                store(k["past"], j * p.conv_C + self.channel, self.window[j + 1])
            if p.conv > 1:
                store(k["past"], (p.conv - 2) * p.conv_C + self.channel, x)


def stream(
    k: Kernel,
    count: int,
    stride: int,
    unroll: int,
    first: Expr,
    ask: Callable[[Buffer, Expr, int], None],
    use: Callable[[Buffer, Expr, int], None],
    held: int = 0,
    wait: bool = True,
) -> None:
    """Elements first, first + stride, ... below `count`: `unroll` at a time are asked for together, then used.

    The first of them are asked for before the launch before this one is complete: they are weights. held: words that
    wait for their use, four for each element unless told. wait: nothing in this kernel has waited yet.
    """
    full, rest = divmod(count, stride)
    raw = local(held or 4 * unroll, "uint32")
    begin = min(full, unroll)
    ask(raw, 0, begin)
    if wait:
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
    store(k["y"], t * p.M + row, settled(k, p, y, t, row))


def settled(k: Kernel, p: Any, y: Expr, t: Expr, row: Expr) -> Expr:
    """A sum with what comes behind it."""
    if p.bias:
        y = y + k["bias"][row]
    if p.act == "silu":
        y = silu(let(y))
    return y + k["residual"][t * p.ldr + row] if p.residual else y


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
