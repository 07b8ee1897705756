"""y[T,M] = x[T,K] W[M,K]^T + bias + residual with 4- or 8-bit weights and int8 activations (see kernels/linear_q).

Four products of bytes at a time, exact in int32 within a block of 32, as on a CPU. T = 1: 16 rows a block of threads,
weights streamed in words of 16 bytes (4 rows x 4 k, twice that for 4 bits). T > 1: `linear_q_mma` on tensor cores where
there are any, else tiles of 64 rows x 64 tokens, one block of 32 of each in shared memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..kernels._quantise import BLOCK, OUTPUTS, blocks, output_params
from ..kernels.linear_q import PAIR_BYTES, LinearQ
from ..tvm_api import T, tirx
from . import Built, linear_q_mma
from ._emit import (
    Buffer,
    Expr,
    Kernel,
    half,
    kernel,
    let,
    local,
    reduce_rows,
    shared,
    silu,
    store,
    strided,
    sync,
    when,
    words,
    zero,
)
from ._quantise import write_block
from .linear import GEMM_THREADS, ROWS, TILE, epilogue, finish_tile, gemv_threads, run_gemv, stream

UNROLL = 4
INPUTS = ("xq", "xscale", "xoffset")  # where "q", "scale" and "offset" are what is written


@dataclass(frozen=True)
class FusedLinearQ(LinearQ):
    """A product of one token with what stands behind it.

    glu:   y = silu(x W^T) (x WU^T), two products of one shape; quant: written as int8 blocks for weights of this zero
           point instead (see kernels/glu).
    """

    glu: bool = False
    quant: int | None = None

    @property
    def args(self) -> tuple[str, ...]:
        own = super().args[:-1]
        up = ("wu", "wus") if self.glu else ()
        if self.quant is None:
            return (*own, *up, "y")
        return (*INPUTS, *own[len(INPUTS) :], *up, *OUTPUTS)


def build(name: str, p: LinearQ, gpu: Any) -> Built:
    groups, n = -(-p.M // ROWS), blocks(p.K)
    params = parameters(p, gpu.mma)
    if p.T == 1:
        threads = gemv_threads(gpu, groups, group_bytes(p))
        quant = getattr(p, "quant", None)
        grid = groups if quant is None else blocks(p.M)  # a block of activations is 32 rows
        with kernel(name, params, grid, threads, gpu, early=True) as k:
            if quant is not None:
                _quantised_rows(k, p, quant)
            elif getattr(p, "glu", False):
                _gated_rows(k, p)
            else:
                run_gemv(k, Gemv(k, p))
        return Built(k.func, grid, threads)
    if gpu.mma:
        return linear_q_mma.build(name, p, params, gpu)
    grid = -(-p.M // TILE) * -(-p.T // TILE)
    with kernel(name, params, grid, GEMM_THREADS, gpu) as k:
        _gemm(k, p, n, groups)
    return Built(k.func, grid, GEMM_THREADS)


def parameters(p: LinearQ, mma: bool = False) -> list[tuple[str, str, int]]:
    """Name, dtype and elements of every argument; mma: of many tokens are multiplied by tensor cores."""
    groups, n = -(-p.M // ROWS), blocks(p.K)
    weight_words = groups * (n // 2) * PAIR_BYTES[p.bits] // 4
    sizes = {
        "q": ("int32", p.T * n * BLOCK // 4),
        "scale": ("float32", p.T * n),
        "offset": ("int32", p.T * n),
        "w": ("uint32x4", weight_words // 4) if p.T == 1 else ("int32", weight_words),
        "ws": ("uint32x2", weight_words // 2) if p.T == 1 else ("uint32", weight_words),
        "bias": ("float32", p.M),
        "residual": ("float32", (p.T - 1) * p.ldr + p.M),
        "y": ("float32", p.T * p.M),
    }
    if p.T > 1 and mma:
        sizes["w"] = ("uint32x2", weight_words // 2)
    if isinstance(p, FusedLinearQ):
        sizes |= {"wu": sizes["w"], "wus": sizes["ws"]}
        if p.quant is not None:
            sizes |= {name: sizes[o] for name, o in zip(INPUTS, OUTPUTS, strict=True)}
            sizes |= output_params(1, p.M)
    return [(a, *sizes[a]) for a in p.args]


def group_bytes(p: LinearQ) -> int:
    """Bytes of 16 rows of the weights."""
    return blocks(p.K) // 2 * PAIR_BYTES[p.bits]


def _low(word: Expr) -> Expr:
    """The four low nibbles of a word as bytes."""
    return word & T.int32(0x0F0F0F0F)


def _high(word: Expr) -> Expr:
    return (word >> 4) & T.int32(0x0F0F0F0F)


def dp4a(a: Expr, b: Expr, c: Expr) -> Expr:
    """c + the four products of signed bytes."""
    return T.call_pure_extern("int32", "es_dp4a", a, b, c)


def _gated_rows(k: Kernel, p: LinearQ) -> None:
    """A block of threads has 16 rows of the gated product."""
    gemv, gate, scratch = Gemv(k, p), local(1), shared(k.threads * 4)
    total = _sums(k, p, k.block, "w", scratch, True)
    with when(gemv.mine):
        store(gate, 0, silu(let(total(k.thread))))
    total = _sums(k, p, k.block, "wu", scratch, False)
    with when(gemv.mine):
        epilogue(k, p, let(gate[0] * total(k.thread)), 0, gemv.row)


def _quantised_rows(k: Kernel, p: LinearQ, zero_point: int) -> None:
    """A block of threads has 32 rows of the gated product, and writes them as one block of activations: zeros behind M,
    where the last group's weights are read once more."""
    scratch, y = shared(k.threads * 4), shared(BLOCK)
    last, whole = -(-p.M // ROWS) - 1, p.M % (2 * BLOCK) == 0
    for part in range(2):
        own = k.block * 2 + part
        group = own if whole else let(T.min(own, T.int32(last)))
        total = _sums(k, p, group, "w", scratch, part == 0)
        gate = local(1)
        with when(k.thread < ROWS):
            store(gate, 0, silu(let(total(k.thread))))
        total = _sums(k, p, group, "wu", scratch, False)
        with when(k.thread < ROWS):
            product = let(gate[0] * total(k.thread))
            exists = own * ROWS + k.thread < p.M
            store(y, part * ROWS + k.thread, product if whole else tirx.Select(exists, product, T.float32(0.0)))
    sync()
    write_block(k, k.block, y[k.thread % BLOCK], zero_point, scratch, k.thread < BLOCK)


def _sums(k: Kernel, p: LinearQ, group: Expr, name: str, scratch: Buffer, first_of_all: bool) -> Callable[[Expr], Expr]:
    """The 16 sums of one group of rows of the weights `name`, met."""
    acc = local(4)
    zero(acc, 4)
    Gemv(k, p).accumulate(acc, group, name, first_of_all)
    return reduce_rows(k, acc, 4, 4, scratch)


class Gemv:
    """16 rows of a product of one token. A block of 32 has 4 (8) lines of 16 rows; thread t of its 16 (32) has rows
    4(t%4).. of line t/4."""

    each = across = 4

    def __init__(self, k: Kernel, p: LinearQ) -> None:
        self.k, self.p = k, p
        self.row = k.block * ROWS + k.thread
        self.mine = k.thread < ROWS if p.M % ROWS == 0 else T.And(k.thread < ROWS, self.row < p.M)

    def finish(self, total: Callable[[Expr], Expr]) -> None:
        with when(self.mine):
            epilogue(self.k, self.p, let(total(self.k.thread)), 0, self.row)

    def accumulate(self, acc: Buffer, group: Expr = None, name: str = "w", wait: bool = True) -> None:
        """wait: weights are asked for before the inputs are known to be there."""
        k, p, n = self.k, self.p, blocks(self.p.K)
        pair, team = PAIR_BYTES[p.bits] // 16, 4 * p.bits  # words of 16 bytes of a pair; one per thread of a block
        stride = k.threads // team
        line, quad = let(k.thread % team // 4), let(k.thread % 4)
        first = let(k.thread // team)
        base = let((k.block if group is None else group) * (n // 2 * pair))
        scales = local(2 * UNROLL, "uint32")
        q, scale, offset = (k[x] for x in (INPUTS if INPUTS[0] in k.buffers else OUTPUTS))

        def ask(raw: Buffer, start: Expr, count: int) -> None:
            for u in range(count):
                b = start + u * stride + first
                at = base + b // 2 * pair
                words(k[name], at + 4 + b % 2 * team + line * 4 + quad, raw, 4 * u)
                words(k[name + "s"], at * 2 + b % 2 * 4 + quad, scales, 2 * u, 2)

        def use(raw: Buffer, start: Expr, count: int) -> None:
            for u in range(count):
                b = start + u * stride + first
                a = let(scale[b])
                x0 = let(q[b * 8 + line])
                x1 = let(q[b * 8 + line + 4]) if p.bits == 4 else None
                init = let(tirx.Select(line == 0, offset[b], T.int32(0)))
                for r in range(4):
                    w = T.reinterpret("int32", raw[4 * u + r])
                    total = dp4a(_high(w), x1, dp4a(_low(w), x0, init)) if p.bits == 4 else dp4a(w, x0, init)
                    bits = scales[2 * u + r // 2]
                    s = half(bits & T.uint32(0xFFFF) if r % 2 == 0 else bits >> T.uint32(16))
                    store(acc, r, acc[r] + T.Cast("float32", total) * (s * a))

        stream(k, n, stride, UNROLL, first, ask, use, wait=wait)


def _gemm(k: Kernel, p: LinearQ, n: int, groups: int) -> None:
    tiles = -(-p.M // TILE)
    first_row, first_token = let(k.block % tiles * TILE), let(k.block // tiles * TILE)
    w, x = shared(8 * TILE, "int32"), shared(8 * (TILE + 1), "int32")
    ws, xs, xo = shared(TILE), shared(TILE), shared(TILE, "int32")
    acc = local(16)
    zero(acc, 16)
    i, j = let(k.thread // 16), let(k.thread % 16)
    pair_words, block_words = PAIR_BYTES[p.bits] // 4, 32 * p.bits // 2

    with T.serial(n) as b:
        sync()

        def weights(index: Expr) -> None:
            group, rest = index // block_words, index % block_words
            line, lane = rest // ROWS, rest % ROWS
            g = first_row // ROWS + group
            raw = local(1, "int32")
            store(raw, 0, T.int32(0))
            with when(g < groups):
                at = (g * (n // 2) + b // 2) * pair_words + 16 + b % 2 * block_words
                store(raw, 0, k["w"][at + rest])
            if p.bits == 4:
                store(w, line * TILE + group * ROWS + lane, _low(raw[0]))
                store(w, (line + 4) * TILE + group * ROWS + lane, _high(raw[0]))
            else:
                store(w, line * TILE + group * ROWS + lane, raw[0])

        def row_scales(row: Expr) -> None:
            g = first_row // ROWS + row // ROWS
            value = local(1)
            store(value, 0, T.float32(0.0))
            with when(g < groups):
                bits = k["ws"][(g * (n // 2) + b // 2) * pair_words + b % 2 * 8 + row % ROWS // 2]
                store(value, 0, half((bits >> T.Cast("uint32", row % 2 * 16)) & T.uint32(0xFFFF)))
            store(ws, row, value[0])

        def tokens(index: Expr) -> None:
            token, word = index // 8, index % 8
            raw = local(1, "int32")
            store(raw, 0, T.int32(0))
            with when(first_token + token < p.T):
                store(raw, 0, k["q"][((first_token + token) * n + b) * 8 + word])
            store(x, word * (TILE + 1) + token, raw[0])

        def token_scales(token: Expr) -> None:
            store(xs, token, T.float32(0.0))
            store(xo, token, T.int32(0))
            with when(first_token + token < p.T):
                store(xs, token, k["scale"][(first_token + token) * n + b])
                store(xo, token, k["offset"][(first_token + token) * n + b])

        strided(k, TILE // ROWS * block_words, weights)
        strided(k, TILE, row_scales)
        strided(k, TILE * 8, tokens)
        strided(k, TILE, token_scales)
        sync()
        ints = local(16, "int32")
        for r in range(4):
            for c in range(4):
                store(ints, r * 4 + c, xo[j + 16 * c])
        with T.serial(8) as d:
            wr, xr = local(4, "int32"), local(4, "int32")
            for r in range(4):
                store(wr, r, w[d * TILE + i * 4 + r])
                store(xr, r, x[d * (TILE + 1) + j + 16 * r])
            for r in range(4):
                for c in range(4):
                    store(ints, r * 4 + c, dp4a(wr[r], xr[c], ints[r * 4 + c]))
        for r in range(4):
            for c in range(4):
                at = r * 4 + c
                scale = ws[i * 4 + r] * xs[j + 16 * c]
                store(acc, at, acc[at] + T.Cast("float32", ints[at]) * scale)
    finish_tile(k, p, acc, first_row, first_token, i, j)
