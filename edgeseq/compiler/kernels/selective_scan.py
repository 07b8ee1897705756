"""Mamba's selective scan (Gu and Dao 2023, eq. 2 with exp(dt A) for A and dt B for B), gate and skip included.

dt <- clip(softplus(dt + dt_bias));  S[n,d] <- exp(dt[d] A[n,d]) S[n,d] + dt[d] u[d] B[n]
y[d] = (sum_n C[n] S[n,d] + Dskip[d] u[d]) silu(z[d])
Lanes are channels; the state of a block stays in registers or first-level cache over all tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class SelectiveScan:
    """T tokens, D channels, N states; ld*: floats between tokens of each input.

    A is packed columns16: [ceil(D/16)][N][16].
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


def build(name: str, p: SelectiveScan) -> Built:
    rows = {"u": (p.ldu, p.D), "dt": (p.lddt, p.D), "B": (p.ldB, p.N), "C": (p.ldC, p.N), "z": (p.ldz, p.D)}
    floats = {a: (p.T - 1) * ld + n for a, (ld, n) in rows.items()}
    floats |= {"A": -(-p.D // LANES) * LANES * p.N, "Dskip": p.D, "dt_bias": p.D, "past": p.N * p.D, "y": p.T * p.D}
    sizes = {a: ("float32", n) for a, n in floats.items()} | output_params(p.T, p.D)
    per_block = LANES if p.quant is None else BLOCK
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        strips = per_block // LANES
        # one token changes each number once, where it stands
        registers = [_State(local(p.N * LANES), 0, LANES) for _ in range(strips)] if p.T > 1 else None
        rows_ahead = [("u", p.ldu), ("dt", p.lddt), *([("z", p.ldz)] if p.gate else [])]
        result = local(per_block)

        def block(first: Expr, count: int) -> None:
            cover = [(i * LANES, min(LANES, count - i * LANES)) for i in range(-(-count // LANES))]
            for n in range(p.N):  # the state's rows lie apart, and the next block's are wanted soon
                for at, _ in cover:
                    prefetch(k["past"], n * p.D + first + per_block + at)
            for i in range(0, per_block * p.N, LANES):
                prefetch(k["A"], (first + per_block) * p.N + i)
            past = [_State(k["past"], first + at, p.D) for at, _ in cover]
            states = registers or past
            if registers:
                _copy(p, cover, past, registers)

            def token(t: Expr) -> None:
                if p.T > AHEAD:
                    for name, ld in rows_ahead:
                        for at, _ in cover:
                            prefetch(k[name], (t + AHEAD) * ld + first + at)
                _channels(k, p, states, t, first, cover, result)
                for at, lanes in cover:
                    if p.quant is None:
                        store(k["y"], t * p.D + first + at, load(result, at, lanes), lanes)
                if p.quant is not None:
                    low, high = load(result, 0), load(result, LANES)
                    write_block(k, t * blocks(p.D) + first // BLOCK, low, high, p.quant)

            loop(p.T, token)
            if registers:
                _copy(p, cover, registers, past)

        grid = split_blocks(k.block, p.D, per_block, block)
    return Built(k.func, grid)


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


class _State(NamedTuple):
    """State n of a vector of channels, at base + n step of a buffer."""

    buffer: Buffer
    base: Expr | int
    step: int

    def load(self, n: int, lanes: int) -> Expr:
        return load(self.buffer, self.base + n * self.step, lanes)

    def store(self, n: int, value: Expr, lanes: int) -> None:
        store(self.buffer, self.base + n * self.step, value, lanes)


def _copy(p: SelectiveScan, cover: list[tuple[int, int]], source: list[_State], target: list[_State]) -> None:
    for a, b, (_, lanes) in zip(source, target, cover, strict=False):
        for n in range(p.N):
            b.store(n, a.load(n, lanes), lanes)


class _Strip(NamedTuple):
    """A vector of channels at one token: where it begins in the block, dt log2(e), dt u, and the sum of C S so far."""

    state: _State
    at: int
    lanes: int
    u: Expr
    exponent: Expr
    dtu: Expr
    sum: Buffer


def _channels(
    k: Kernel, p: SelectiveScan, states: list[_State], t: Expr, first: Expr, cover: list[tuple[int, int]], y: Buffer
) -> None:
    """Advance the states of the channels from `first` by token t. cover: (offset, lanes) of each strip; y: their y."""
    strips = []
    for state, (at, lanes) in zip(states, cover, strict=False):
        u = let(load(k["u"], t * p.ldu + first + at, lanes))
        dt = _step_size(k, p, t, first + at, lanes)
        strip = _Strip(state, at, lanes, u, let(dt * splat(LOG2_E, lanes)), let(dt * u), local(LANES))
        store(strip.sum, 0, splat(0.0, lanes), lanes)
        strips.append(strip)
    for n in range(p.N):  # the strips in turns: B and C of a state serve all of them from one register
        for x in strips:
            A = load(k["A"], ((first + x.at) // LANES * p.N + n) * LANES, x.lanes)
            s = T.exp2(x.exponent * A) * x.state.load(n, x.lanes)
            s = let(s + x.dtu * splat(k["B"][t * p.ldB + n], x.lanes))
            x.state.store(n, s, x.lanes)
            store(x.sum, 0, load(x.sum, 0, x.lanes) + s * splat(k["C"][t * p.ldC + n], x.lanes), x.lanes)
    for x in strips:
        out = load(x.sum, 0, x.lanes)
        if p.skip:
            out = out + load(k["Dskip"], first + x.at, x.lanes) * x.u
        if p.gate:
            out = out * silu(let(load(k["z"], t * p.ldz + first + x.at, x.lanes)))
        store(y, x.at, out, x.lanes)
