"""Short causal depthwise convolution with its state, optionally followed by SiLU.

full = [past[0..k-2]; x],  y[t,c] = bias[c] + sum_j w[j,c] full[t+j,c],  past <- last k-1 rows of full.
State and weights are time-major ([k-1,C] and [k,C]), so lanes are channels. In place: a block owns its channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import Built
from ._emit import LANES, Expr, kernel, let, load, local, loop, pieces, silu, split_blocks, store
from ._quantise import BLOCK, OUTPUTS, blocks, output_params, write_block

CHANNELS_PER_BLOCK = 4 * LANES


@dataclass(frozen=True)
class CausalConv:
    """T tokens, C channels, k taps; ldx: floats between tokens of x.

    quant: write y also as int8 blocks for weights of this zero point (C a multiple of 64).
    """

    T: int
    C: int
    k: int
    ldx: int
    bias: bool
    silu: bool
    quant: int | None = None

    @property
    def args(self) -> tuple[str, ...]:
        return ("x", "w", *(("bias",) if self.bias else ()), "past", "y", *(OUTPUTS if self.quant is not None else ()))


def build(name: str, p: CausalConv) -> Built:
    floats = {"x": (p.T - 1) * p.ldx + p.C, "w": p.k * p.C, "bias": p.C, "past": (p.k - 1) * p.C, "y": p.T * p.C}
    sizes = {a: ("float32", n) for a, n in floats.items()} | output_params(p.T, p.C)
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as kern:
        window = local(p.k * LANES)

        def channels(c: Expr, lanes: int) -> None:
            for j in range(p.k - 1):
                store(window, j * LANES, load(kern["past"], j * p.C + c, lanes), lanes)

            def token(t: Expr) -> None:
                x = let(load(kern["x"], t * p.ldx + c, lanes))
                y = load(kern["w"], (p.k - 1) * p.C + c, lanes) * x
                for j in range(p.k - 1):
                    y = y + load(kern["w"], j * p.C + c, lanes) * load(window, j * LANES, lanes)
                if p.bias:
                    y = y + load(kern["bias"], c, lanes)
                y = let(y)
                store(kern["y"], t * p.C + c, silu(y) if p.silu else y, lanes)
                for j in range(p.k - 2):
                    store(window, j * LANES, load(window, (j + 1) * LANES, lanes), lanes)
                if p.k > 1:
                    store(window, (p.k - 2) * LANES, x, lanes)

            loop(p.T, token)
            for j in range(p.k - 1):
                store(kern["past"], j * p.C + c, load(window, j * LANES, lanes), lanes)

        def block(first: Expr, count: int) -> None:
            for offset, lanes in pieces(count):
                channels(first + offset, lanes)
            if p.quant is not None:
                quantise(first)

        def quantise(first: Expr) -> None:
            def token(t: Expr) -> None:
                for b in range(CHANNELS_PER_BLOCK // BLOCK):
                    y = t * p.C + first + b * BLOCK
                    low, high = let(load(kern["y"], y)), let(load(kern["y"], y + LANES))
                    write_block(kern, t * blocks(p.C) + first // BLOCK + b, low, high, p.quant or 0)

            loop(p.T, token)

        grid = split_blocks(kern.block, p.C, CHANNELS_PER_BLOCK, block)
    return Built(kern.func, grid)
