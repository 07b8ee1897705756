"""A long causal convolution over its whole past, with the append (ai.edgeseq.LongConvStep); lanes are channels.

past[position + t] <- x[t];  y[t] = d x[t] + sum_j h[j] past[position + t - j],  j < min(position + t + 1, L).
A block owns its channels: it appends all its rows first. Tokens of a chunk are taken four at a time, so that a row of
the past is read once for four of them. Rows above position + T are never read.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T, tirx
from . import Built
from ._emit import LANES, Expr, kernel, let, load, local, loop, splat, split_blocks, store

TOKENS = 4


@dataclass(frozen=True)
class LongConv:
    """T new tokens, C channels, L taps, M rows of history; ldx: floats between tokens of x.

    h: packed columns16 of [L,C]: [ceil(C/16)][L][16].
    """

    T: int
    C: int
    L: int
    M: int
    ldx: int
    skip: bool = False

    @property
    def args(self) -> tuple[str, ...]:
        return ("x", "h", *(("d",) if self.skip else ()), "past", "position", "y")


def build(name: str, p: LongConv) -> Built:
    floats = {
        "x": (p.T - 1) * p.ldx + p.C, "h": -(-p.C // LANES) * LANES * p.L, "d": p.C, "past": p.M * p.C,
        "y": p.T * p.C,
    }  # fmt: skip
    sizes = {a: ("float32", n) for a, n in floats.items()} | {"position": ("int64", 1)}
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as kern:
        acc = local(TOKENS * LANES)

        def strip(c: Expr, lanes: int) -> None:
            position = let(T.Cast("int32", kern["position"][0]))
            taps = c // LANES * (p.L * LANES)

            def append(t: Expr) -> None:
                store(kern["past"], (position + t) * p.C + c, load(kern["x"], t * p.ldx + c, lanes), lanes)

            def multiply(token: int, tap: Expr, row: Expr) -> None:
                h, x = load(kern["h"], taps + tap * LANES, lanes), load(kern["past"], row * p.C + c, lanes)
                store(acc, token * LANES, load(acc, token * LANES, lanes) + h * x, lanes)

            def tokens(first: Expr, count: int) -> None:
                """Tokens first .. first + count - 1: taps that reach the same rows together, the rest one by one."""
                row = let(position + first)
                for i in range(count):
                    x = load(kern["x"], (first + i) * p.ldx + c, lanes)
                    store(acc, i * LANES, load(kern["d"], c, lanes) * x if p.skip else splat(0.0, lanes), lanes)
                for i in range(count):
                    for tap in range(min(i, p.L)):  # rows newer than the first token's
                        multiply(i, tap, row + (i - tap))
                together = max(p.L - count + 1, 0)
                shared = let(tirx.Select(row + 1 < together, row + 1, T.int32(together)))
                with T.serial(shared) as j:
                    x = let(load(kern["past"], (row - j) * p.C + c, lanes))
                    for i in range(count):
                        h = load(kern["h"], taps + (j + i) * LANES, lanes)
                        store(acc, i * LANES, load(acc, i * LANES, lanes) + h * x, lanes)
                for i in range(count):
                    for tap in range(together + i, p.L):  # taps that other tokens of the group have no more
                        with T.If(row + i >= tap), T.Then():
                            multiply(i, tap, row + (i - tap))
                for i in range(count):
                    store(kern["y"], (first + i) * p.C + c, load(acc, i * LANES, lanes), lanes)

            loop(p.T, append)
            loop(p.T // TOKENS, lambda g: tokens(g * TOKENS, TOKENS))
            if p.T % TOKENS:
                tokens(p.T // TOKENS * TOKENS, p.T % TOKENS)

        grid = split_blocks(kern.block, p.C, LANES, lambda first, count: strip(first, count))
    return Built(kern.func, grid)
