"""Writing int8 blocks of 32 activations: one value a thread, 32 neighbouring threads a block (kernels/_quantise)."""

from __future__ import annotations

from ..kernels._quantise import BLOCK, OUTPUTS, blocks, output_params
from ..tvm_api import T, tirx
from ._emit import Buffer, Expr, Kernel, add, f32, let, maximum, reduce_within, store, when

__all__ = ["BLOCK", "OUTPUTS", "blocks", "output_params", "write_block"]


def write_block(k: Kernel, at: Expr, x: Expr, zero: int, scratch: Buffer, inside: Expr | bool = True) -> None:
    """The 32 threads of an aligned run write block number `at`: a thread has value x, its number modulo 32 the place.

    Every thread of the kernel comes here; where `inside` (equal for the run) does not hold nothing is written.
    scratch: shared, a float per thread; it may be used again after the next barrier only.
    """
    store_block(k, at, round_block(k, x, scratch), zero, inside)


def round_block(k: Kernel, x: Expr, scratch: Buffer) -> tuple[Expr, Expr, Expr]:
    """Largest |x| of the thread's run, this thread's code, and the sum of the run's codes; all barriers are here."""
    x = let(x)
    amax = reduce_within(k, T.max(x, f32(0.0) - x), BLOCK, maximum, scratch)
    inverse = let(tirx.Select(amax > f32(0.0), f32(127.0) / amax, f32(0.0)))
    code = let(T.call_pure_extern("int32", "es_rint", x * inverse))
    total = reduce_within(k, T.Cast("float32", code), BLOCK, add, scratch)  # at most 32 * 127: exact
    return amax, code, total


def store_block(k: Kernel, at: Expr, rounded: tuple[Expr, Expr, Expr], zero: int, inside: Expr | bool) -> None:
    """Write what `round_block` found as block number `at` of k's outputs."""
    amax, code, total = rounded
    lane = k.thread % BLOCK
    with when(inside):
        store(k["q"], at * BLOCK + lane, T.Cast("int8", code))
        with when(lane == 0):
            store(k["scale"], at, amax * f32(1.0 / 127.0))
            store(k["offset"], at, T.Cast("int32", total) * T.int32(-zero))
