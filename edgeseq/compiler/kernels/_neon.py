"""Products of int8 blocks on 64-bit ARM: sdot takes its four activations from a lane, smmla those of two tokens.

Weights lie as `linear_q` says. In a block of 32, vector (j, i) of 16 bytes holds [4 rows][4 k]: rows from 4 i on, group
j of k; at 4 bits its high nibbles are those of group j + 4. A loop turn is one block: LLVM moves loads across all that
it sees, and with two blocks it spilled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..tvm_api import T, tirx
from ._emit import LANES, Buffer, Expr, Kernel, let, load, local, loop, prefetch, splat, store
from ._quantise import blocks

Codes = Callable[[int, int], list[tuple[int, Expr]]]
NAMES = ("dotprod", "i8mm")
TILES = {"dotprod": (2, 4, 5), "i8mm": (2, 4, 6)}
"""Tokens whose sums of 16 rows fit 32 registers beside the operands."""
BYTES = 16
VECTORS = 4
"""Of 4 rows, in a group of 16."""
SPAN = 64
"""Tokens whose float accumulators of 16 rows lie in the first cache, 4 KiB."""
AHEAD = 1024
MAGIC = 0x4B400000
"""The bits of 1.5 * 2^23, to which an integer may be added as if it were one."""


def block_bytes(bits: int) -> int:
    """Codes of 16 rows and 32 k."""
    return 64 * bits


def pair_bytes(bits: int) -> int:
    return 64 + 2 * block_bytes(bits)


# one tile, all k


def multiply_tile(k: Kernel, p: Any, acc: Buffer, tokens: list[Expr], groups: list[Expr], n: int, ahead: bool) -> None:
    """As in `linear_q`, by sdot: acc[16 (t G + g) ...] = 16 rows of group g times row tokens[t]."""
    for i in range(len(tokens) * len(groups)):
        store(acc, i * LANES, splat(0.0))
    with T.serial(n) as b:
        for r, group in enumerate(groups):
            base, half = (group * (n // 2) + b // 2) * pair_bytes(p.bits), b % 2
            at = base + 64 + half * block_bytes(p.bits)
            if ahead:
                for line in range(0, block_bytes(p.bits), 64):
                    prefetch(k["w"], at + line + AHEAD)
            scales = let(T.Cast("float32x16", load(k["ws"], base // 2 + half * LANES)))
            ints = _sdot_tile(k, p, tokens, b, n, _reader(k, p, at))
            for t, token in enumerate(tokens):
                here = (t * len(groups) + r) * LANES
                a = let(splat(k["scale"][token * n + b]))
                store(acc, here, load(acc, here) + _float(load(ints, t * LANES)) * (scales * a))


def _sdot_tile(k: Kernel, p: Any, tokens: list[Expr], b: Expr, n: int, codes: Codes) -> Buffer:
    """16 rows of a block times some tokens: [token][row] in int32, see `_float`."""
    ints, x = local(len(tokens) * LANES, "int32"), _activations(k, tokens, b, n)
    for t, token in enumerate(tokens):
        store(ints, t * LANES, T.broadcast(_start(k, p, token * n + b), LANES))
    for j in range(p.bits):
        for i in range(VECTORS):
            for group, vector in codes(j, i):
                for t in range(len(tokens)):
                    four = tirx.Shuffle([load(x, t * 8 + group // 4 * 4, 4)], [T.int32(group % 4)] * 4)
                    _accumulate(ints, t * LANES + i * 4, "sdot", T.reinterpret("int8x16", vector), four)
    return ints


def _activations(k: Kernel, tokens: list[Expr], b: Expr, n: int) -> Buffer:
    """Their block b, 8 int32 each."""
    x = local(len(tokens) * 8, "int32")
    for t, token in enumerate(tokens):
        for half in (0, 4):
            store(x, t * 8 + half, load(k["q"], (token * n + b) * 8 + half, 4), 4)
    return x


def _start(k: Kernel, p: Any, block: Expr) -> Expr:
    """What sums begin with: the zero point's share (8-bit codes are signed here and have none), ready for `_float`."""
    return T.int32(MAGIC) if p.bits == 8 else k["offset"][block] + T.int32(MAGIC)


def _float(sums: Expr, lanes: int = LANES) -> Expr:
    """Sums that began with MAGIC, as floats: exact below 2^22, and scvtf takes twice the time of this subtraction."""
    return T.reinterpret(f"float32x{lanes}", sums) - splat(1.5 * 2**23, lanes)


def _codes(k: Kernel, p: Any, at: Expr, j: int, i: int) -> list[tuple[int, Expr]]:
    """(k group, 16 bytes) of the vector (j, i) of the block at `at`."""
    raw = load(k["w"], at + (j * VECTORS + i) * BYTES, BYTES)
    return [(j, raw)] if p.bits == 8 else [(j, _low(raw)), (j + 4, _high(raw))]


def _reader(k: Kernel, p: Any, at: Expr) -> Codes:
    return lambda j, i: _codes(k, p, at, j, i)


def _low(raw: Expr) -> Expr:
    return raw & T.broadcast(T.uint8(15), BYTES)


def _high(raw: Expr) -> Expr:
    return raw >> T.broadcast(T.uint8(4), BYTES)


def _accumulate(ints: Buffer, at: int, name: str, a: Expr, b: Expr) -> None:
    """ints[at:at+4] += the products of 16 bytes; b is an int32x4."""
    intrinsic = f"llvm.aarch64.neon.{name}.v4i32.v16i8"
    products = T.call_llvm_pure_intrin("int32x4", intrinsic, load(ints, at, 4), a, T.reinterpret("int8x16", b))
    store(ints, at, products, 4)


# a chunk of tokens: what a block of weights becomes is shared by all of them


def chunk(k: Kernel, p: Any, group: Expr, finish: Callable[[Buffer, int, Expr], None]) -> None:
    """16 rows times all p.T tokens; finish(acc, at, t) takes those of token t from acc[at : at + 16]."""
    full, rest = divmod(p.T, SPAN)
    loop(full, lambda s: _span(k, p, group, s * SPAN, SPAN, finish))
    if rest:
        _span(k, p, group, full * SPAN, rest, finish)


def _span(k: Kernel, p: Any, group: Expr, first: Expr, count: int, finish: Any) -> None:
    """`count` tokens. Their sums lie in memory, [token][row] or, of smmla, [2 tokens][2 rows][token][row]."""
    n, tile, paired = blocks(p.K), min(p.tile[0], count), p.isa == "i8mm"
    if paired:
        tile = min(tile + tile % 2, count)
    acc = local((count + count % 2) * LANES)
    with T.serial(count + count % 2) as t:
        store(acc, t * LANES, splat(0.0))
    with T.serial(n) as b:
        base, half = (group * (n // 2) + b // 2) * pair_bytes(p.bits), b % 2
        at = base + 64 + half * block_bytes(p.bits)
        scales = _spread(k, base // 2 + half * LANES, paired)
        codes = _paired_codes(k, p, at) if paired else _unpacked(k, p, at)
        run = _paired_tile if paired else _plain_tile
        whole = count // tile
        loop(whole, lambda i: run(k, p, acc, first, i * tile, tile, b, n, codes, scales))
        if count % tile:
            run(k, p, acc, first, whole * tile, count % tile, b, n, codes, scales)
    if paired:
        _finish_pairs(acc, first, count, finish)
    else:
        with T.serial(count) as t:
            finish(acc, t * LANES, first + t)


def _spread(k: Kernel, at: Expr, paired: bool) -> Buffer:
    """A block's 16 scales as floats; paired: rows 2 i and 2 i + 1 of them twice each, s0 s1 s0 s1."""
    scales = let(T.Cast("float32x16", load(k["ws"], at)))
    spread = local(2 * LANES)
    store(spread, 0, scales)
    if paired:
        lanes = [2 * (i // 4) + i % 2 for i in range(2 * LANES)]
        for half in (0, LANES):
            store(spread, half, tirx.Shuffle([scales], [T.int32(x) for x in lanes[half : half + LANES]]))
    return spread


def _unpacked(k: Kernel, p: Any, at: Expr) -> Codes:
    """As `_codes`, but nibbles are taken apart once."""
    if p.bits == 8:
        return _reader(k, p, at)
    split = local(8 * VECTORS * BYTES, "uint8")
    for j in range(4):
        for i in range(VECTORS):
            for group, vector in _codes(k, p, at, j, i):
                store(split, (group * VECTORS + i) * BYTES, vector, BYTES)
    return lambda j, i: [(g, load(split, (g * VECTORS + i) * BYTES, BYTES)) for g in (j, j + 4)]


def _plain_tile(
    k: Kernel, p: Any, acc: Buffer, first: Expr, at: Expr, count: int, b: Expr, n: int, codes: Codes, scales: Buffer
) -> None:
    tokens = [let(first + at + t) for t in range(count)]
    ints = _sdot_tile(k, p, tokens, b, n, codes)
    for t, token in enumerate(tokens):
        here, a = (at + t) * LANES, let(splat(k["scale"][token * n + b]))
        store(acc, here, load(acc, here) + _float(load(ints, t * LANES)) * (load(scales, 0) * a))


def _paired_codes(k: Kernel, p: Any, at: Expr) -> Codes:
    """smmla's operands [2 rows][8 k]: codes(g, i) is that of k 8 g to 8 g + 7 and rows 2 i and 2 i + 1."""
    zipped = local(4 * 8 * BYTES, "uint8")
    for g in range(p.bits // 2):
        for i in range(VECTORS):
            a, b = (load(k["w"], at + (j * VECTORS + i) * BYTES, BYTES) for j in (2 * g, 2 * g + 1))
            for odd, lanes in enumerate(([0, 4, 1, 5], [2, 6, 3, 7])):
                both = T.reinterpret(
                    "uint8x16", _mixed(T.reinterpret("int32x4", a), T.reinterpret("int32x4", b), lanes)
                )
                row = 2 * i + odd
                store(zipped, (g * 8 + row) * BYTES, both if p.bits == 8 else _low(both), BYTES)
                if p.bits == 4:
                    store(zipped, ((g + 2) * 8 + row) * BYTES, _high(both), BYTES)
    return lambda g, i: [(g, load(zipped, (g * 8 + i) * BYTES, BYTES))]


def _mixed(a: Expr, b: Expr, lanes: list[int]) -> Expr:
    """Four lanes of a (0 to 3) and b (4 to 7)."""
    return tirx.Shuffle([a, b], [T.int32(lane) for lane in lanes])


LOW, HIGH = [0, 1, 4, 5], [2, 3, 6, 7]
"""Halves of two vectors, for `_mixed`."""


def _paired_tile(
    k: Kernel, p: Any, acc: Buffer, first: Expr, at: Expr, count: int, b: Expr, n: int, codes: Codes, scales: Buffer
) -> None:
    """A last token without a partner is its own."""
    tokens = [let(first + at + min(t, count - 1)) for t in range(count + count % 2)]
    x, pairs = _activations(k, tokens, b, n), range(len(tokens) // 2)
    ints = local(len(tokens) * LANES, "int32")
    for pair in pairs:
        low, high = (T.broadcast(_start(k, p, tokens[2 * pair + t] * n + b), 4) for t in range(2))
        for i in range(8):
            store(ints, (pair * 8 + i) * 4, _mixed(low, high, LOW), 4)
    for g in range(4):
        both = [_two_tokens(x, 2 * pair, g) for pair in pairs]
        for i in range(8):
            ((_, vector),) = codes(g, i)
            for pair in pairs:
                tokens_first = T.reinterpret("int8x16", both[pair])
                _accumulate(ints, (pair * 8 + i) * 4, "smmla", tokens_first, vector)
    for pair in pairs:
        low, high = (splat(k["scale"][tokens[2 * pair + t] * n + b], 4) for t in range(2))
        a = let(_mixed(low, high, LOW))
        for i in range(8):
            here = (at + 2 * pair) * LANES + i * 4
            products = _float(load(ints, (pair * 8 + i) * 4, 4), 4) * (load(scales, i * 4, 4) * a)
            store(acc, here, load(acc, here, 4) + products, 4)


def _two_tokens(x: Buffer, t: int, g: int) -> Expr:
    """smmla's operand [2 tokens][8 k]: k 8 g to 8 g + 7 of tokens t and t + 1."""
    a, b = (load(x, token * 8 + g // 2 * 4, 4) for token in (t, t + 1))
    return _mixed(a, b, (LOW, HIGH)[g % 2])


def _finish_pairs(acc: Buffer, first: Expr, count: int, finish: Any) -> None:
    def pair(i: Expr, tokens: int) -> None:
        rows = local(2 * LANES)
        for v in range(VECTORS):
            a, b = (load(acc, i * 2 * LANES + (2 * v + odd) * 4, 4) for odd in range(2))
            for t, lanes in enumerate((LOW, HIGH)):
                store(rows, t * LANES + v * 4, _mixed(a, b, lanes), 4)
        for t in range(tokens):
            finish(rows, t * LANES, first + 2 * i + t)

    loop(count // 2, lambda i: pair(i, 2))
    if count % 2:
        pair(count // 2, 1)
