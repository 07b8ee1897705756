"""y[T,M] = x[T,K] W[M,K]^T + bias + residual with 4- or 8-bit weights in blocks of 32 and int8 activations.

W[m,k] = s[m,b] (u[m,k] - zero), x[t,k] = a[t,b] q[t,k]; per block of 32 the product is exact in int32:
    y = sum_b s a (sum_k u q - zero sum_k q),   the last term comes with the activations as `offset`.
Layout `q4x16` / `q8x16` (`s8x16`: codes as signed bytes, so that no zero point is left): for 16 rows and a pair of
blocks, 2x16 fp16 scales, then the two blocks, each as [8][16 rows][4 k] bytes (q8) or the same with k-groups j and j+4
in the low and high nibbles (q4), so that one vector multiplies 16 rows by the same four activations. Every pair is a
multiple of 64 bytes: 576 or 1088.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..tvm_api import T
from . import Built, _neon
from ._emit import LANES, Buffer, Expr, Kernel, kernel, let, load, local, prefetch, splat, store
from ._quantise import BLOCK, blocks
from ._tiles import accumulators, streams, variants
from .linear import epilogue, guard_tail, split_rows

if TYPE_CHECKING:
    from ..targets import Target

PAIR_BYTES = {4: 64 + 2 * 256, 8: 64 + 2 * 512}
AHEAD = {4: 2, 8: 1}
"""Pairs that a GEMV of several streams asks for ahead, into the first cache: about 1100 bytes a stream."""
GROUPS_OF_4 = BLOCK // 4


@dataclass(frozen=True)
class LinearQ:
    """isa: "vnni" or "avx2" (x86 u8 x s8), "dotprod" or "i8mm" (ARM s8 x s8, see `_neon`) or "plain" (any CPU).

    tile: (tokens, row groups) of the GEMM. streams: row groups that a block of the GEMV reads in turns. ahead:
    several are asked for before they are needed.
    """

    T: int
    M: int
    K: int
    bits: int
    isa: str
    bias: bool = False
    residual: bool = False
    ldr: int = 0
    act: str = "none"
    tile: tuple[int, int] = (8, 2)
    streams: int = 1
    ahead: bool = False

    @property
    def args(self) -> tuple[str, ...]:
        optional = (*(("bias",) if self.bias else ()), *(("residual",) if self.residual else ()))
        return ("q", "scale", "offset", "w", "ws", *optional, "y")


def candidates(p: LinearQ, target: Target) -> list[LinearQ]:
    """What tuning may choose from: as for `linear`; an accumulator has two registers, for floats and for integers."""
    groups = -(-p.M // LANES)
    if p.T > 1 and p.isa in _neon.NAMES:
        own = min(p.T, p.tile[0])
        return [p, *(replace(p, tile=(n, 1)) for n in _neon.TILES[p.isa] if n <= p.T and n != own)]
    return streams(p, groups) if p.T == 1 else variants(p, p.T, groups, accumulators(target.features) // 2)


def build(name: str, p: LinearQ) -> Built:
    groups, n = -(-p.M // LANES), blocks(p.K)
    weight_bytes = groups * (n // 2) * PAIR_BYTES[p.bits]
    sizes = {
        "q": ("int32", p.T * n * BLOCK // 4),
        "scale": ("float32", p.T * n),
        "offset": ("int32", p.T * n),
        "w": ("uint8", weight_bytes),
        "ws": ("float16", weight_bytes // 2),
        "bias": ("float32", p.M),
        "residual": ("float32", (p.T - 1) * p.ldr + p.M),
        "y": ("float32", p.T * p.M),
    }
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        grid = split_rows(k, groups, p, lambda mine: _rows(k, p, groups, mine))
    return Built(k.func, grid)


def _rows(k: Kernel, p: LinearQ, groups: int, mine: list[Expr]) -> None:
    """Some groups of rows for all tokens, in tiles of tokens."""
    if p.isa in _neon.NAMES and p.T > 1:
        for group in mine:
            _neon.chunk(k, p, group, _finisher(k, p, groups, group))
        return
    rows = len(mine)
    tokens = 1 if p.T == 1 else -(-p.T // -(-p.T // p.tile[0]))
    acc = local(tokens * rows * LANES)
    for t0 in range(0, p.T, tokens):
        tile = range(min(tokens, p.T - t0))
        multiply_tile(k, p, acc, [t0 + t for t in tile], mine, blocks(p.K), p.ahead and p.T == 1 and rows > 1)
        for t in tile:
            for r, group in enumerate(mine):
                at = (t * rows + r) * LANES
                guard_tail(group, groups, p.M, _finish(k, p, acc, at, t0 + t, group))


def _finisher(k: Kernel, p: LinearQ, groups: int, group: Expr) -> Callable[[Buffer, Expr, Expr], None]:
    return lambda acc, at, t: guard_tail(group, groups, p.M, _finish(k, p, acc, at, t, group))


def _finish(k: Kernel, p: LinearQ, acc: Buffer, at: Expr, t: Expr, group: Expr):  # type: ignore[no-untyped-def]
    return lambda lanes: epilogue(k, p, acc, at, t, group * LANES, lanes)


def multiply_tile(
    k: Kernel, p: Any, acc: Buffer, tokens: list[Expr], groups: list[Expr], n: int, ahead: bool = False
) -> None:
    """acc[16 (t G + g) ...] = 16 rows of group g times row tokens[t]: int32 within a block, float32 across blocks.

    k has q, scale, offset, w and ws; p has bits and isa; n is the number of blocks of a row, even.
    """
    if p.isa in _neon.NAMES:
        return _neon.multiply_tile(k, p, acc, tokens, groups, n, ahead)
    pair_bytes, rows = PAIR_BYTES[p.bits], len(groups)
    for i in range(len(tokens) * rows):
        store(acc, i * LANES, splat(0.0))
    chains = 2 if len(tokens) * rows == 1 else 1
    ints = local(len(tokens) * rows * chains * LANES, "int32")
    with T.serial(n // 2) as pair:
        for half in range(2):
            b = pair * 2 + half
            bases = [let((group * (n // 2) + pair) * pair_bytes) for group in groups]
            for t, token in enumerate(tokens):
                for r in range(rows):
                    first = T.broadcast(k["offset"][token * n + b], LANES)
                    at = (t * rows + r) * chains * LANES
                    store(ints, at, first)
                    if chains == 2:
                        store(ints, at + LANES, T.broadcast(T.int32(0), LANES))
            _products(k, p, ints, bases, half, b, tokens, n, chains, ahead)
            scales = [
                let(T.Cast("float32x16", load(k["ws"], bases[r] // 2 + half * LANES))) for r in range(rows)
            ]  # fmt: skip
            for t, token in enumerate(tokens):
                a = let(splat(k["scale"][token * n + b]))
                for r in range(rows):
                    at = (t * rows + r) * LANES
                    total = load(ints, at * chains)
                    if chains == 2:
                        total = total + load(ints, at * chains + LANES)
                    store(acc, at, load(acc, at) + T.Cast("float32x16", total) * (scales[r] * a))


def _products(
    k: Kernel,
    p: Any,
    ints: Buffer,
    bases: list[Expr],
    half: int,
    b: Expr,
    tokens: list[Expr],
    n: int,
    chains: int,
    ahead: bool,
) -> None:
    """ints += W_block q_block for 8 groups of four k; nibble vectors are loaded once and used twice."""
    body = 64 + half * (256 if p.bits == 4 else 512)
    for j in range(GROUPS_OF_4 // 2 if p.bits == 4 else GROUPS_OF_4):
        parts: list[tuple[int, list[Expr]]] = []
        if ahead:
            for base in bases:
                prefetch(k["w"], base + body + j * 64 + AHEAD[p.bits] * PAIR_BYTES[p.bits])
        raw = [_register(k["w"][T.ramp(base + body + j * 64, 1, 64)])[T.ramp(0, 1, 64)] for base in bases]
        if p.bits == 4:
            parts.append((j, [v & T.broadcast(T.uint8(15), 64) for v in raw]))
            parts.append((j + 4, [v >> T.broadcast(T.uint8(4), 64) for v in raw]))
        else:
            parts.append((j, raw))
        for group, weights in parts:
            named = [_register(w) for w in weights]
            for t, token in enumerate(tokens):
                x = k["q"][(token * n + b) * GROUPS_OF_4 + group]
                for r, w in enumerate(named):
                    at = ((t * len(bases) + r) * chains + (group % chains)) * LANES
                    _dot(p.isa, p.bits, ints, at, w, x)


def _register(value: Expr) -> Buffer:
    """A vector of 64 bytes kept in registers."""
    register = local(64, "uint8")
    T.buffer_store(register, value, [T.ramp(0, 1, 64)])
    return register


def _dot(isa: str, bits: int, ints: Buffer, at: int, w: Expr, x: Expr) -> None:
    """ints[at:at+16] += four products per row. w: buffer of 64 bytes [16 rows][4]; x: four int8 in one int32."""
    if isa == "vnni":
        wide = T.reinterpret("int8x64", T.broadcast(x, LANES))
        codes = T.reinterpret("int8x64", w[T.ramp(0, 1, 64)])
        name = "llvm.x86.avx512.vpdpbusd.512"
        store(ints, at, T.call_llvm_pure_intrin("int32x16", name, load(ints, at), codes, wide))
    elif isa == "avx2":
        _dot_avx2(bits, ints, at, w, x)
    else:
        _dot_plain(ints, at, w, x)


def _dot_avx2(bits: int, ints: Buffer, at: int, w: Expr, x: Expr) -> None:
    """pmaddubsw wants u8 x s8 and saturates at 2^15: |w| <= 128 with the sign moved to x stays below it."""
    wide = T.reinterpret("int8x32", T.broadcast(x, 8))
    ones = T.broadcast(T.int16(1), 16)
    for i in range(2):
        codes = T.reinterpret("int8x32", w[T.ramp(i * 32, 1, 32)])
        signed = wide
        if bits == 8:
            signed = T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", wide, codes)
            codes = T.call_llvm_pure_intrin("int8x32", "llvm.abs.v32i8", codes, T.boolean(False))
        pairs = T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", codes, signed)
        quads = T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, ones)
        store(ints, at + i * 8, load(ints, at + i * 8, 8) + quads, 8)


def _dot_plain(ints: Buffer, at: int, w: Expr, x: Expr) -> None:
    words = T.reinterpret("int32x16", w[T.ramp(0, 1, 64)])
    for i in range(4):
        up, down = T.broadcast(T.int32(24 - 8 * i), LANES), T.broadcast(T.int32(24), LANES)
        xi = T.broadcast((x << (24 - 8 * i)) >> 24, LANES)
        store(ints, at, load(ints, at) + ((words << up) >> down) * xi)
