"""Complex modes over T tokens, the state in place (ai.edgeseq.DiagScan); lanes are channels.

x[n] <- a[n] x[n] + u;  y = Re(sum_n c[n] x[n]) + d u.
Modes are taken a few at a time through all tokens, so that state, poles and residues are read once whatever T is and
y is the only thing touched per token and group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from . import Built
from ._emit import LANES, Expr, kernel, let, load, local, loop, splat, split_blocks, store

GROUP = 4  # modes in registers at a time
PER_BLOCK = 4 * LANES  # channels


@dataclass(frozen=True)
class DiagScan:
    """T tokens, C channels, N modes; ldu: floats between tokens of u.

    a, c: packed columns16 of [2N,C]: [ceil(C/16)][2N][16]; a plain [2N] where the channels share it.
    """

    T: int
    C: int
    N: int
    ldu: int
    skip: bool = False
    shared: bool = False

    @property
    def args(self) -> tuple[str, ...]:
        return ("u", "a", "c", *(("d",) if self.skip else ()), "past", "y")


def build(name: str, p: DiagScan) -> Built:
    packed = -(-p.C // LANES) * LANES * 2 * p.N
    sizes = {
        "u": (p.T - 1) * p.ldu + p.C, "a": 2 * p.N if p.shared else packed, "c": packed, "d": p.C,
        "past": 2 * p.N * p.C, "y": p.T * p.C,
    }  # fmt: skip
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args]) as kern:
        state, poles, residues = (local(2 * GROUP * LANES) for _ in range(3))

        def start(c: Expr, lanes: int, t: Expr) -> None:
            u = load(kern["u"], t * p.ldu + c, lanes)
            store(kern["y"], t * p.C + c, load(kern["d"], c, lanes) * u if p.skip else splat(0.0, lanes), lanes)

        def modes(c: Expr, lanes: int, first: Expr, count: int) -> None:
            row = first * 2
            packed_row = (c // LANES * (2 * p.N) + row) * LANES
            for i in range(2 * count):
                pole = splat(kern["a"][row + i], lanes) if p.shared else load(kern["a"], packed_row + i * LANES, lanes)
                store(poles, i * LANES, pole, lanes)
                store(residues, i * LANES, load(kern["c"], packed_row + i * LANES, lanes), lanes)
                store(state, i * LANES, load(kern["past"], (row + i) * p.C + c, lanes), lanes)
            loop(p.T, lambda t: token(c, lanes, t, count))
            for i in range(2 * count):
                store(kern["past"], (row + i) * p.C + c, load(state, i * LANES, lanes), lanes)

        def token(c: Expr, lanes: int, t: Expr, count: int) -> None:
            u = let(load(kern["u"], t * p.ldu + c, lanes))
            y = load(kern["y"], t * p.C + c, lanes)
            for i in range(0, 2 * count, 2):
                at, next_ = i * LANES, (i + 1) * LANES
                re, im = load(state, at, lanes), load(state, next_, lanes)
                a_re, a_im = load(poles, at, lanes), load(poles, next_, lanes)
                new_re, new_im = let(a_re * re - a_im * im + u), let(a_re * im + a_im * re)
                y = y + load(residues, at, lanes) * new_re - load(residues, next_, lanes) * new_im
                store(state, at, new_re, lanes)
                store(state, next_, new_im, lanes)
            store(kern["y"], t * p.C + c, y, lanes)

        def block(first: Expr, count: int) -> None:
            strips = [(first + at, min(LANES, count - at)) for at in range(0, count, LANES)]
            for c, lanes in strips:
                loop(p.T, partial(start, c, lanes))

            def group(at: Expr, size: int) -> None:
                for c, lanes in strips:  # side by side: a row of the state is read in whole runs of lines
                    modes(c, lanes, at, size)

            loop(p.N // GROUP, lambda g: group(g * GROUP, GROUP))
            if p.N % GROUP:
                group(p.N // GROUP * GROUP, p.N % GROUP)

        grid = split_blocks(kern.block, p.C, PER_BLOCK, block)
    return Built(kern.func, grid)
