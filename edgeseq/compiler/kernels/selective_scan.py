"""Mamba's selective scan (Gu and Dao 2023, eq. 2 with exp(dt A) for A and dt B for B), gate and skip included.

dt <- clip(softplus(dt + dt_bias));  S[n,d] <- exp(dt[d] A[n,d]) S[n,d] + dt[d] u[d] B[n]
y[d] = (sum_n C[n] S[n,d] + Dskip[d] u[d]) silu(z[d])
Lanes are channels. Of one token, A and S are read as rows of states; of several, the states of a few channels are kept
in registers or first-level cache over all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..tvm_api import T, tirx
from . import Built
from ._emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    kernel,
    let,
    load,
    local,
    loop,
    pieces,
    prefetch,
    silu,
    softplus,
    splat,
    split_blocks,
    store,
)
from ._quantise import BLOCK, OUTPUTS, blocks, output_params, write_block

LOG2_E = 1.4426950408889634
AHEAD = 4  # tokens whose rows are asked for: each lies in another page, which no prefetcher follows
WIDE = 256  # channels of a block of one token: what is read of each row
ROWS = 4  # read side by side


@dataclass(frozen=True)
class SelectiveScan:
    """T tokens, D channels, N states; ld*: floats between tokens of each input.

    quant: write int8 blocks for weights of this zero point instead of y (D a multiple of 64).
    """

    T: int
    D: int
    N: int
    ldu: int
    lddt: int
    ldB: int
    ldC: int
    ldz: int = 0
    skip: bool = False
    gate: bool = False
    dt_bias: bool = False
    dt_softplus: bool = True
    dt_min: float = 0.0
    dt_max: float = math.inf
    quant: int | None = None

    @property
    def args(self) -> tuple[str, ...]:
        switches = (("Dskip", self.skip), ("z", self.gate), ("dt_bias", self.dt_bias))
        optional = [a for a, on in switches if on]
        return ("u", "dt", "A", "B", "C", *optional, "past", *(("y",) if self.quant is None else OUTPUTS))

    @property
    def sizes(self) -> dict[str, tuple[str, int]]:
        """dtype and elements of what an argument points to."""
        rows = {"u": (self.ldu, self.D), "dt": (self.lddt, self.D), "z": (self.ldz, self.D)}
        rows |= {"B": (self.ldB, self.N), "C": (self.ldC, self.N)}
        floats = {a: (self.T - 1) * ld + n for a, (ld, n) in rows.items()}
        floats |= dict.fromkeys(("A", "past"), self.N * self.D) | dict.fromkeys(("Dskip", "dt_bias"), self.D)
        floats["y"] = self.T * self.D
        return {a: ("float32", n) for a, n in floats.items()} | output_params(self.T, self.D)


def build(name: str, p: SelectiveScan) -> Built:
    with kernel(name, [(a, *p.sizes[a]) for a in p.args]) as k:
        grid = _token(k, p) if p.T == 1 else _tokens(k, p)
    return Built(k.func, grid)


def _token(k: Kernel, p: SelectiveScan) -> int:
    """The grid of a kernel for one token, whose time is that of reading A and the state."""
    exponent, dtu, total = local(WIDE), local(WIDE), local(WIDE)
    inputs = [x for x in ("u", "dt", "z", "dt_bias", "Dskip") if x in p.args]

    def block(first: Expr, count: int) -> None:
        def each(width: int, body: Callable[[Expr, int], None]) -> None:
            whole, rest = divmod(count, width)
            loop(whole, lambda i: body(i * width, width))
            if rest:
                body(whole * width, rest)

        def prepare(at: Expr, lanes: int) -> None:
            for x in inputs:
                prefetch(k[x], first + at + WIDE, level=2)
            _begin(k, p, 0, first + at, lanes, (exponent, dtu, total), at)

        def rows(n: Expr, count: int) -> None:
            b, c = ([let(k[x][n + i]) for i in range(count)] for x in "BC")

            def advance(at: Expr, lanes: int) -> None:
                states = [(n + i) * p.D + first + at for i in range(count)]
                for row in states:  # the next block's: into the second-level cache, as the first may lose it again
                    prefetch(k["past"], row + WIDE, level=2)
                    prefetch(k["A"], row + WIDE, level=2)
                e, x = let(load(exponent, at, lanes)), let(load(dtu, at, lanes))
                decays = [let(T.exp2(e * load(k["A"], row, lanes))) for row in states]
                present = [
                    let(decay * load(k["past"], row, lanes) + x * splat(bn, lanes))
                    for decay, row, bn in zip(decays, states, b, strict=True)
                ]
                y = load(total, at, lanes)
                for s, row, cn in zip(present, states, c, strict=True):
                    store(k["past"], row, s, lanes)
                    y = y + s * splat(cn, lanes)
                store(total, at, y, lanes)

            each(LANES, advance)

        def finish(at: Expr, lanes: int) -> None:
            cover = pieces(lanes)
            y = [_output(k, p, 0, first + at + i, n, load(total, at + i, n)) for i, n in cover]
            _write(k, p, 0, first + at, cover, y)

        each(LANES, prepare)
        loop(p.N // ROWS, lambda i: rows(i * ROWS, ROWS))
        if p.N % ROWS:
            rows(p.N // ROWS * ROWS, p.N % ROWS)
        each(LANES if p.quant is None else BLOCK, finish)

    return split_blocks(k.block, p.D, WIDE, block)


def _tokens(k: Kernel, p: SelectiveScan) -> int:
    """The grid of a kernel for several tokens, whose time is that of its arithmetic."""
    per_block = LANES if p.quant is None else BLOCK
    rows_ahead = [("u", p.ldu), ("dt", p.lddt), *([("z", p.ldz)] if p.gate else [])]
    strips = [_Strip(k, p, at) for at in range(0, per_block, LANES)]

    def block(first: Expr, count: int) -> None:
        cover = [(strip, min(LANES, count - strip.at)) for strip in strips if strip.at < count]
        for name in ("A", "past"):
            for n in range(p.N):  # the rows lie apart, and the next block's are wanted soon
                for strip, _ in cover:
                    prefetch(k[name], n * p.D + first + per_block + strip.at)
        for strip, lanes in cover:
            strip.fetch(first, lanes)

        def token(t: Expr) -> None:
            if p.T > AHEAD:
                for name, ld in rows_ahead:
                    for strip, _ in cover:
                        prefetch(k[name], (t + AHEAD) * ld + first + strip.at)
            for strip, lanes in cover:
                strip.begin(t, first, lanes)
            for n in range(p.N):  # the strips in turns: B and C of a state serve all of them from one register
                for strip, lanes in cover:
                    strip.advance(t, n, lanes)
            y = [_output(k, p, t, first + strip.at, lanes, load(strip.sum, 0, lanes)) for strip, lanes in cover]
            _write(k, p, t, first, [(strip.at, lanes) for strip, lanes in cover], y)

        loop(p.T, token)
        for strip, lanes in cover:
            strip.give_back(first, lanes)

    return split_blocks(k.block, p.D, per_block, block)


def _step_size(k: Kernel, p: SelectiveScan, t: Expr, d: Expr, lanes: int) -> Expr:
    """dt of `lanes` channels from d."""
    dt = load(k["dt"], t * p.lddt + d, lanes)
    if p.dt_bias:
        dt = dt + load(k["dt_bias"], d, lanes)
    dt = let(softplus(dt, lanes) if p.dt_softplus else dt)
    if p.dt_min > 0.0:
        dt = let(tirx.Select(dt < splat(p.dt_min, lanes), splat(p.dt_min, lanes), dt))
    if math.isfinite(p.dt_max):
        dt = let(tirx.Select(dt > splat(p.dt_max, lanes), splat(p.dt_max, lanes), dt))
    return dt


def _begin(
    k: Kernel, p: SelectiveScan, t: Expr, d: Expr, lanes: int, scratch: tuple[Buffer, Buffer, Buffer], at: Expr
) -> None:
    """Of `lanes` channels from d: dt log2(e), dt u, and 0 for the sum of C S, each to `at` of its buffer."""
    dt = _step_size(k, p, t, d, lanes)
    exponent, dtu, total = scratch
    store(exponent, at, dt * splat(LOG2_E, lanes), lanes)
    store(dtu, at, dt * load(k["u"], t * p.ldu + d, lanes), lanes)
    store(total, at, splat(0.0, lanes), lanes)


def _output(k: Kernel, p: SelectiveScan, t: Expr, d: Expr, lanes: int, y: Expr) -> Expr:
    """y of `lanes` channels from d, with what is skipped and gated."""
    if p.skip:
        y = y + load(k["Dskip"], d, lanes) * load(k["u"], t * p.ldu + d, lanes)
    if p.gate:
        y = y * silu(let(load(k["z"], t * p.ldz + d, lanes)))
    return let(y)


def _write(k: Kernel, p: SelectiveScan, t: Expr, first: Expr, cover: list[tuple[int, int]], y: list[Expr]) -> None:
    """Vectors of y, or a block of two; cover: (offset from channel `first`, lanes) of each."""
    if p.quant is None:
        for (at, lanes), value in zip(cover, y, strict=True):
            store(k["y"], t * p.D + first + at, value, lanes)
    else:
        write_block(k, t * blocks(p.D) + first // BLOCK, y[0], y[1], p.quant)


class _Strip:
    """A vector of channels of a block, `at` from its first, with their A and states in scratch over all tokens."""

    def __init__(self, k: Kernel, p: SelectiveScan, at: int) -> None:
        self.k, self.p, self.at = k, p, at
        self.A, self.state = local(p.N * LANES), local(p.N * LANES)
        self.exponent, self.dtu, self.sum = local(LANES), local(LANES), local(LANES)

    def fetch(self, first: Expr, lanes: int) -> None:
        for scratch, name in ((self.A, "A"), (self.state, "past")):
            for n in range(self.p.N):
                store(scratch, n * LANES, load(self.k[name], n * self.p.D + first + self.at, lanes), lanes)

    def give_back(self, first: Expr, lanes: int) -> None:
        for n in range(self.p.N):
            store(self.k["past"], n * self.p.D + first + self.at, load(self.state, n * LANES, lanes), lanes)

    def begin(self, t: Expr, first: Expr, lanes: int) -> None:
        _begin(self.k, self.p, t, first + self.at, lanes, (self.exponent, self.dtu, self.sum), 0)

    def advance(self, t: Expr, n: int, lanes: int) -> None:
        k, p = self.k, self.p
        decay = T.exp2(load(self.exponent, 0, lanes) * load(self.A, n * LANES, lanes))
        s = decay * load(self.state, n * LANES, lanes)
        s = let(s + load(self.dtu, 0, lanes) * splat(k["B"][t * p.ldB + n], lanes))
        store(self.state, n * LANES, s, lanes)
        store(self.sum, 0, load(self.sum, 0, lanes) + s * splat(k["C"][t * p.ldC + n], lanes), lanes)
