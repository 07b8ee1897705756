"""Activations to int8 by blocks of 32 (see kernels/quantize): a thread per activation, the padding included."""

from __future__ import annotations

from typing import Any

from ..kernels.quantize import Quantize
from . import Built
from ._emit import blocks_of, f32, kernel, let, local, shared, store, when
from ._quantise import BLOCK, OUTPUTS, blocks, output_params, write_block

THREADS = 128


def build(name: str, p: Quantize, gpu: Any) -> Built:
    width = blocks(p.K) * BLOCK
    outputs = output_params(p.T, p.K)
    params = [("x", "float32", (p.T - 1) * p.ldx + p.K), *((o, *outputs[o]) for o in OUTPUTS)]
    grid = blocks_of(p.T * width, THREADS)
    with kernel(name, params, grid, THREADS, gpu) as k:
        i = let(k.block * THREADS + k.thread)
        inside = True if p.T * width % THREADS == 0 else i < p.T * width
        column, x = let(i % width), local(1)
        store(x, 0, f32(0.0))
        with when(inside), when(True if p.K == width else column < p.K):
            store(x, 0, k["x"][i // width * p.ldx + column])
        write_block(k, i // BLOCK, x[0], p.zero, shared(THREADS), inside)
    return Built(k.func, grid, THREADS)
