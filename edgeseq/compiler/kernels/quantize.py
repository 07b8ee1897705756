"""Activations to int8 by blocks of 32: x[b] ~ s[b] q[b], s = max|x|/127, and the sums of q that zero points need.

q is padded with zeros to whole pairs of blocks, as the packed weights are.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T, tirx
from . import Built
from ._emit import LANES, horizontal_sum, kernel, let, load, local, splat, store

BLOCK = 32


def blocks(k: int) -> int:
    """Blocks of 32 that cover K, rounded up to pairs."""
    return -(-k // (2 * BLOCK)) * 2


@dataclass(frozen=True)
class Quantize:
    """T rows of K floats; ldx: floats between rows; zero: the weights' zero point (sums are stored as -zero*sum)."""

    T: int
    K: int
    ldx: int
    zero: int
    args = ("x", "q", "scale", "offset")


def build(name: str, p: Quantize) -> Built:
    n = blocks(p.K)
    params = [("x", "float32", (p.T - 1) * p.ldx + p.K), ("q", "int8", p.T * n * BLOCK)]
    params += [("scale", "float32", p.T * n), ("offset", "int32", p.T * n)]
    with kernel(name, params) as k:
        scratch = local(LANES)

        def one(b, values, lanes: int) -> None:  # type: ignore[no-untyped-def]
            """values: the two halves of block b."""
            low, high = values
            zero = splat(0.0)
            mag = T.max(T.max(low, zero - low), T.max(high, zero - high))
            store(scratch, 0, mag)
            width = LANES
            while width > 1:
                width //= 2
                store(scratch, 0, T.max(load(scratch, 0, width), load(scratch, width, width)), width)
            amax = let(scratch[0])
            at = k.block * n + b
            T.buffer_store(k["scale"], amax * T.float32(1.0 / 127.0), [at])
            inverse = let(tirx.Select(amax > T.float32(0.0), T.float32(127.0) / amax, T.float32(0.0)))
            total = local(LANES)
            store(total, 0, splat(0.0))
            for half, v in enumerate((low, high)):
                r = let(T.call_llvm_pure_intrin("float32x16", "llvm.rint", v * splat(inverse)))
                T.buffer_store(k["q"], T.Cast("int8x16", r), [T.ramp(at * BLOCK + half * LANES, 1, LANES)])
                store(total, 0, load(total, 0) + r)
            summed = horizontal_sum(scratch, load(total, 0))
            T.buffer_store(k["offset"], T.Cast("int32", summed) * T.int32(-p.zero), [at])

        whole = p.K // BLOCK
        if whole:
            with T.serial(whole) as b:
                x0 = let(k.block * p.ldx + b * BLOCK)
                one(b, (let(load(k["x"], x0)), let(load(k["x"], x0 + LANES))), LANES)
        for b in range(whole, n):
            tail = local(BLOCK)
            for half in (0, LANES):
                store(tail, half, splat(0.0))
            for i in range(max(0, p.K - b * BLOCK)):
                T.buffer_store(tail, k["x"][k.block * p.ldx + b * BLOCK + i], [i])
            one(b, (load(tail, 0), load(tail, LANES)), LANES)
    return Built(k.func, p.T)
