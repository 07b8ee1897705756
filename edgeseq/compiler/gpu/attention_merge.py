"""The parts of a step of attention brought together (see kernels/attention_merge): a block per head, a thread per
column."""

from __future__ import annotations

from typing import Any

from ..kernels.attention_merge import AttentionMerge, sizes_of
from ..kernels.cached_attention import NEVER
from ..tvm_api import T
from . import Built
from ._emit import Expr, blocks_of, f32, kernel, let, local, power_of_two, shared, store, strided
from ._quantise import BLOCK, write_block


def build(name: str, p: AttentionMerge, gpu: Any) -> Built:
    stride = p.d + 2
    threads = max(32, min(gpu.threads, power_of_two(p.d)))
    with kernel(name, [(a, *sizes_of(p)[a]) for a in p.args], p.H, threads, gpu) as k:
        partial, start = k["partial"], let(k.block * (p.parts * stride))
        top = local(1)
        store(top, 0, f32(NEVER))
        with T.serial(p.parts) as i:
            store(top, 0, T.max(top[0], partial[start + i * stride + p.d]))

        def merged(c: Expr) -> Expr:
            sums = local(2)  # weighted accumulators, weights
            store(sums, 0, f32(0.0))
            store(sums, 1, f32(0.0))
            with T.serial(p.parts) as i:
                at = let(start + i * stride)
                weight = let(T.exp(partial[at + p.d] - top[0]))
                store(sums, 0, sums[0] + weight * partial[at + c])
                store(sums, 1, sums[1] + weight * partial[at + p.d + 1])
            return sums[0] / sums[1]

        if p.quant is None:
            strided(k, p.d, lambda c: store(k["o"], k.block * p.d + c, merged(c)))
        else:
            scratch = shared(threads)
            for i in range(blocks_of(p.d, threads)):
                c = let(i * threads + k.thread)
                x = merged(T.min(c, p.d - 1))
                write_block(k, k.block * (p.d // BLOCK) + c // BLOCK, x, p.quant, scratch, c < p.d)
    return Built(k.func, p.H, threads)
