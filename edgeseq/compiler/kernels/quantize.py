"""Activations to int8 by blocks of 32: x[b] ~ s[b] q[b], s = max|x|/127, and the sums of q that zero points need.

q is padded with zeros to whole pairs of blocks, as the packed weights are.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, kernel, let, load, local, splat, store
from ._quantise import BLOCK, OUTPUTS, blocks, output_params, write_block


@dataclass(frozen=True)
class Quantize:
    """T rows of K floats; ldx: floats between rows; zero: the weights' zero point."""

    T: int
    K: int
    ldx: int
    zero: int
    args = ("x", *OUTPUTS)


def build(name: str, p: Quantize) -> Built:
    n = blocks(p.K)
    outputs = output_params(p.T, p.K)
    params = [("x", "float32", (p.T - 1) * p.ldx + p.K), *((o, *outputs[o]) for o in OUTPUTS)]
    with kernel(name, params) as k:
        whole = p.K // BLOCK
        if whole:
            with T.serial(whole) as b:
                x0 = let(k.block * p.ldx + b * BLOCK)
                write_block(k, k.block * n + b, let(load(k["x"], x0)), let(load(k["x"], x0 + LANES)), p.zero)
        for b in range(whole, n):
            tail = local(BLOCK)
            for half in (0, LANES):
                store(tail, half, splat(0.0))
            for i in range(max(0, p.K - b * BLOCK)):
                T.buffer_store(tail, k["x"][k.block * p.ldx + b * BLOCK + i], [i])
            write_block(k, k.block * n + b, load(tail, 0), load(tail, LANES), p.zero)
    return Built(k.func, p.T)
