"""The parts of a step of attention brought together (see kernels/attention_merge): a block per head, a thread per
column."""

from __future__ import annotations

from typing import Any

from ..kernels.attention_merge import AttentionMerge
from ..kernels.cached_attention import NEVER
from ..tvm_api import T
from . import Built
from ._emit import Expr, f32, kernel, let, local, power_of_two, store, strided


def build(name: str, p: AttentionMerge, gpu: Any) -> Built:
    stride = p.d + 2
    threads = max(32, min(gpu.threads, power_of_two(p.d)))
    params = [("partial", "float32", p.H * p.parts * stride), ("o", "float32", p.H * p.d)]
    with kernel(name, params, p.H, threads, gpu) as k:
        partial, start = k["partial"], let(k.block * (p.parts * stride))
        top = local(1)
        store(top, 0, f32(NEVER))
        with T.serial(p.parts) as i:
            store(top, 0, T.max(top[0], partial[start + i * stride + p.d]))

        def column(c: Expr) -> None:
            sums = local(2)  # weighted accumulators, weights
            store(sums, 0, f32(0.0))
            store(sums, 1, f32(0.0))
            with T.serial(p.parts) as i:
                at = let(start + i * stride)
                weight = let(T.exp(partial[at + p.d] - top[0]))
                store(sums, 0, sums[0] + weight * partial[at + c])
                store(sums, 1, sums[1] + weight * partial[at + p.d + 1])
            store(k["o"], k.block * p.d + c, sums[0] / sums[1])

        strided(k, p.d, column)
    return Built(k.func, p.H, threads)
