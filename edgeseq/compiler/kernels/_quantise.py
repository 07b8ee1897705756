"""Writing int8 blocks of 32 activations: used by `quantize` and by every kernel that quantises its own result."""

from __future__ import annotations

from ..tvm_api import T, tirx
from ._emit import LANES, Expr, Kernel, horizontal_sum, let, load, local, splat, store

BLOCK = 32
OUTPUTS = ("q", "scale", "offset")


def blocks(k: int) -> int:
    """Blocks of 32 that cover K, rounded up to pairs."""
    return -(-k // (2 * BLOCK)) * 2


def output_params(rows: int, k: int) -> dict[str, tuple[str, int]]:
    """dtype and elements of q, scale and offset for `rows` rows of k activations."""
    n = blocks(k)
    return {"q": ("int8", rows * n * BLOCK), "scale": ("float32", rows * n), "offset": ("int32", rows * n)}


def write_block(k: Kernel, at: Expr, low: Expr, high: Expr, zero: int) -> None:
    """Block number `at`: q = rint(x / s), s = max|x| / 127, offset = -zero * sum(q); all zeros where max|x| = 0."""
    scratch, total = local(LANES), local(LANES)
    none = splat(0.0)
    store(scratch, 0, T.max(T.max(low, none - low), T.max(high, none - high)))
    width = LANES
    while width > 1:
        width //= 2
        store(scratch, 0, T.max(load(scratch, 0, width), load(scratch, width, width)), width)
    amax = let(scratch[0])
    T.buffer_store(k["scale"], amax * T.float32(1.0 / 127.0), [at])
    inverse = let(tirx.Select(amax > T.float32(0.0), T.float32(127.0) / amax, T.float32(0.0)))
    store(total, 0, none)
    for half, x in enumerate((low, high)):
        r = let(T.call_llvm_pure_intrin("float32x16", "llvm.rint", x * splat(inverse)))
        T.buffer_store(k["q"], T.Cast("int8x16", r), [T.ramp(at * BLOCK + half * LANES, 1, LANES)])
        store(total, 0, load(total, 0) + r)
    T.buffer_store(k["offset"], T.Cast("int32", horizontal_sum(scratch, load(total, 0))) * T.int32(-zero), [at])


def clear_block(k: Kernel, at: Expr) -> None:
    """A block of padding."""
    T.buffer_store(k["scale"], T.float32(0.0), [at])
    T.buffer_store(k["offset"], T.int32(0), [at])
    T.buffer_store(k["q"], T.broadcast(T.int8(0), BLOCK), [T.ramp(at * BLOCK, 1, BLOCK)])
