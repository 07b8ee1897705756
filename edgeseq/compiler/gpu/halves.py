"""x[T,K] as sums of 16-bit floats, laid out as tensor cores take them: the other factor of `linear_mma`.

One 16-bit float would lose half the digits. float16: x 2^e = h0 + h1 with the largest of a token in 2^14 .. 2^15, so
that none overflows and 22 bits stay; `scale` is 2^-e. bfloat16 reaches as far as float32: x = h0 + h1 + h2, exactly.
Order: [octet of tokens][step of 32 k][part][lane][4 words], word (s, r) of lane 4g + i: k = 16s + 8r + i and the one 4
behind it, of token g. What is behind T and K is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..tvm_api import T
from . import Built
from ._emit import (
    Buffer,
    Expr,
    Kernel,
    blocks_of,
    f32,
    half,
    kernel,
    let,
    local,
    maximum,
    reduce_all,
    shared,
    store,
    when,
)
from ._mma import STEP

THREADS = 128
PARTS = {"float16": 2, "bfloat16": 3}
OUTPUTS = ("h", "scale")


@dataclass(frozen=True)
class Halves:
    """T rows of K floats, ldx apart; wdtype: of the weights they are multiplied by."""

    T: int
    K: int
    ldx: int
    wdtype: str
    args = ("x", *OUTPUTS)


def sizes(tokens: int, K: int, wdtype: str) -> dict[str, tuple[str, int]]:
    """dtype and elements of h and scale."""
    octets = blocks_of(tokens, 8)
    return {
        "h": ("uint32x4", octets * blocks_of(K, STEP) * PARTS[wdtype] * 32),
        "scale": ("float32", octets * 8),
    }


def build(name: str, p: Halves, gpu: Any) -> Built:
    outputs, steps = sizes(p.T, p.K, p.wdtype), blocks_of(p.K, STEP)
    grid = blocks_of(p.T, 8) * 8
    params = [("x", "float32", (p.T - 1) * p.ldx + p.K), *((o, *outputs[o]) for o in OUTPUTS)]
    with kernel(name, params, grid, THREADS, gpu) as k:
        exists = True if p.T == grid else k.block < p.T
        factor = _factor(k, p, exists)

        def lane(i: Expr) -> None:
            """Four words of each part: 8 activations of one step."""
            step, place = let(i // 4), let(i % 4)
            x, packed = local(8), local(4 * PARTS[p.wdtype], "uint32")
            for j in range(8):
                column = step * STEP + 4 * j + place
                store(x, j, f32(0.0))
                with when(exists), when(True if p.K % STEP == 0 else column < p.K):
                    value = k["x"][k.block * p.ldx + column]
                    store(x, j, value if factor is None else value * factor)
            SPLIT[p.wdtype](x, packed)
            for part in range(PARTS[p.wdtype]):
                at = ((k.block // 8 * steps + step) * PARTS[p.wdtype] + part) * 32 + k.block % 8 * 4 + place
                store(k["h"], at, packed[T.ramp(4 * part, 1, 4)])

        each(k, steps * 4, lane)
    return Built(k.func, grid, THREADS)


def each(k: Kernel, count: int, body: Callable[[Expr], None]) -> None:
    """body(i) for i below count, shared out over the threads."""
    with T.serial(blocks_of(count, THREADS)) as n:
        i = let(n * THREADS + k.thread)
        with when(True if count % THREADS == 0 else i < count):
            body(i)


def _factor(k: Kernel, p: Halves, exists: Expr | bool) -> Expr | None:
    """The power of two that a token of float16 is multiplied by; scale[token] is its inverse."""
    if p.wdtype != "float16":
        with when(k.thread == 0):
            store(k["scale"], k.block, f32(1.0))
        return None
    most = local(1)
    store(most, 0, f32(0.0))

    def look(i: Expr) -> None:
        x = let(k["x"][k.block * p.ldx + i])
        store(most, 0, T.max(most[0], T.max(x, f32(0.0) - x)))

    with when(exists):
        each(k, p.K, look)
    largest = reduce_all(k, most[0], maximum, shared(THREADS))
    exponent = T.reinterpret("int32", largest) >> 23
    field = let(T.min(268 - exponent, 253))  # 127 + 14 less that of the largest; both powers are normal numbers
    with when(k.thread == 0):
        store(k["scale"], k.block, T.reinterpret("float32", (254 - field) << 23))
    return let(T.reinterpret("float32", field << 23))


def _float16(x: Buffer, packed: Buffer) -> None:
    bits = local(16, "uint32")
    for j in range(8):
        store(bits, j, T.call_pure_extern("uint32", "es_half_bits", x[j]))
        store(bits, 8 + j, T.call_pure_extern("uint32", "es_half_bits", x[j] - half(bits[j])))
    for part in range(2):
        for word in range(4):
            low, high = (bits[8 * part + 2 * word + e] for e in range(2))
            store(packed, 4 * part + word, low | high << T.uint32(16))


def _bfloat16(x: Buffer, packed: Buffer) -> None:
    """By cutting off: 8 digits each, and nothing is left after the third."""
    top = T.uint32(0xFFFF0000)
    for part in range(3):
        for word in range(4):
            low, high = (let(T.reinterpret("uint32", x[2 * word + e]) & top) for e in range(2))
            store(packed, 4 * part + word, low >> T.uint32(16) | high)
            for e, cut in enumerate((low, high)):
                store(x, 2 * word + e, x[2 * word + e] - T.reinterpret("float32", cut))


SPLIT = {"float16": _float16, "bfloat16": _bfloat16}
