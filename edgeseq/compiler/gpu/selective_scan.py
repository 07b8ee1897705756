"""Mamba's selective scan with its state in place (see kernels/selective_scan).

A block has 32 channels, and `parts` threads share the states of a channel: state number i * parts + part, in registers
over all tokens. Tokens go in tiles: step sizes once, then the recurrence, then the outputs, which the parts' sums meet
in shared memory for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..kernels.selective_scan import LOG2_E, SelectiveScan
from ..tvm_api import T, tirx
from . import Built
from ._emit import (
    Buffer,
    Expr,
    Kernel,
    await_inputs,
    blocks_of,
    f32,
    kernel,
    let,
    local,
    loop,
    shared,
    silu,
    softplus,
    store,
    sync,
    unpack,
    when,
)
from ._quantise import BLOCK, blocks, write_block


@dataclass(frozen=True)
class FusedScan(SelectiveScan):
    """A step with what is small before it.

    dt_rank: its step sizes are a product of its own: dt = W r, W[D,dt_rank] packed `rows16`, r [dt_rank]; 0 for none.
    norm: B and C are each divided by the root of their mean square + eps; norm_weight: and multiplied by B_w, C_w [N].
    """

    dt_rank: int = 0
    dt_wdtype: str = "float32"
    norm: bool = False
    norm_weight: bool = False
    eps: float = 0.0

    @property
    def args(self) -> tuple[str, ...]:
        u, dt, *rest = super().args
        weights = ("B_w", "C_w") if self.norm_weight else ()
        return (u, *(("dt_r", "dt_w") if self.dt_rank else (dt,)), *weights, *rest)

    @property
    def sizes(self) -> dict[str, tuple[str, int]]:
        floats = {"B_w": self.N, "C_w": self.N, "dt_r": self.dt_rank}
        weights = ("float32" if self.dt_wdtype == "float32" else "uint16", -(-self.D // 16) * 16 * self.dt_rank)
        return super().sizes | {a: ("float32", n) for a, n in floats.items()} | {"dt_w": weights}


CHANNELS = 32
MOST_STATES = 8  # of a thread, where there are threads enough
TILE = 8


def build(name: str, params: SelectiveScan, gpu: Any) -> Built:
    p = FusedScan(**vars(params))  # of a plain scan one with nothing before it
    parts = 1
    while parts < min(p.N, 4) or (p.N > parts * MOST_STATES and 2 * parts * CHANNELS <= gpu.threads):
        parts *= 2
    grid, threads = blocks_of(p.D, CHANNELS), parts * CHANNELS
    with kernel(name, [(a, *p.sizes[a]) for a in p.args], grid, threads, gpu, early=True) as k:
        _Scan(k, p, parts).run()
    return Built(k.func, grid, threads)


class _Scan:
    """The states of one thread."""

    def __init__(self, k: Kernel, p: FusedScan, parts: int) -> None:
        self.k, self.p, self.parts = k, p, parts
        self.each = blocks_of(p.N, parts)
        self.lane = k.thread % CHANNELS if parts > 1 else k.thread
        self.part = k.thread // CHANNELS if parts > 1 else 0
        self.d = let(k.block * CHANNELS + self.lane)
        self.exists: Expr | bool = True if p.D % CHANNELS == 0 else self.d < p.D
        self.S, self.A = local(self.each), local(self.each)
        self.tile = min(TILE, p.T)
        self.sums = shared(self.tile * k.threads)
        self.steps: tuple[Buffer, ...] = ()
        if p.T > 1:
            self.steps = (shared(self.tile * CHANNELS), shared(self.tile * CHANNELS))
        self.scratch = shared(k.threads) if p.quant is not None else None
        self.scales: dict[str, Expr] = {}

    def _states(self) -> list[tuple[int, Expr, Expr | bool]]:
        """(register, state, whether there is such a state)."""
        whole = self.p.N // self.parts
        found = [(i, i * self.parts + self.part) for i in range(self.each)]
        return [(i, n, True if i < whole else self.part < self.p.N % self.parts) for i, n in found]

    def run(self) -> None:
        p, k = self.p, self.k
        for i, n, inside in self._states():
            if inside is not True:
                store(self.S, i, f32(0.0))
                store(self.A, i, f32(0.0))
            with when(self.exists), when(inside):
                store(self.S, i, k["past"][n * p.D + self.d])
                store(self.A, i, k["A"][n * p.D + self.d])
        if p.dt_rank:
            self._project()
        else:
            await_inputs()
        if p.norm:
            self.scales = {name: self._scale(name) for name in ("B", "C")}
        loop(p.T // self.tile, lambda i: self._tile(i * self.tile, self.tile))
        if p.T % self.tile:
            self._tile(p.T // self.tile * self.tile, p.T % self.tile)
        for i, n, inside in self._states():
            with when(self.exists), when(inside):
                store(k["past"], n * p.D + self.d, self.S[i])

    def _tile(self, t0: Expr, count: int) -> None:
        p = self.p
        if p.T > 1:
            self._shared_out(count, lambda u, inside: self._prepare(t0, u, inside))
            sync()
        with when(self.exists):
            loop(count, lambda u: self._token(t0, u))
        sync()
        self._shared_out(count, lambda u, inside: self._finish(t0, u, inside))
        if p.T > count:
            sync()

    def _shared_out(self, count: int, body: Any) -> None:
        """body(token of the tile, whether it exists) for this part's tokens."""
        for first in range(0, count, self.parts):
            left = count - first
            body(first + self.part, True if left >= self.parts else self.part < left)

    def _prepare(self, t0: Expr, u: Expr, inside: Expr | bool) -> None:
        with when(self.exists), when(inside):
            exponent, dtu = self._step_size(t0 + u)
            store(self.steps[0], u * CHANNELS + self.lane, exponent)
            store(self.steps[1], u * CHANNELS + self.lane, dtu)

    def _project(self) -> None:
        """self.dt: the channel's step size before bias and softplus; the parts share out its sum."""
        p, k, n = self.p, self.k, blocks_of(self.p.dt_rank, self.parts)
        weights, total = local(n), local(1)
        sums = shared(k.threads)

        def each(body: Any) -> None:
            for i in range(n):
                r = i * self.parts + self.part
                inside = True if (i + 1) * self.parts <= p.dt_rank else r < p.dt_rank
                with when(self.exists), when(inside):
                    body(i, r)

        def ask(i: int, r: Expr) -> None:
            raw = k["dt_w"][(self.d // 16 * p.dt_rank + r) * 16 + self.d % 16]
            store(weights, i, raw if p.dt_wdtype == "float32" else unpack(T.Cast("uint32", raw), p.dt_wdtype)[0])

        each(ask)
        await_inputs()
        store(total, 0, f32(0.0))
        each(lambda i, r: store(total, 0, total[0] + weights[i] * k["dt_r"][r]))
        store(sums, k.thread, total[0])
        sync()
        dt = sums[self.lane]
        for part in range(1, self.parts):
            dt = dt + sums[part * CHANNELS + self.lane]
        self.dt = let(dt)

    def _scale(self, name: str) -> Expr:
        """What normalises B or C; every thread adds up the few squares by itself."""
        p, total = self.p, local(1)
        store(total, 0, f32(0.0))

        def add(n: Expr) -> None:
            x = let(self.k[name][n])
            store(total, 0, total[0] + x * x)

        loop(p.N, add)
        return let(f32(1.0) / T.sqrt(total[0] * f32(1.0 / p.N) + f32(p.eps)))

    def _input(self, name: str, t: Expr, n: Expr) -> Expr:
        """B or C of a token, normalised."""
        p, k = self.p, self.k
        x = k[name][t * (p.ldB if name == "B" else p.ldC) + n]
        if name in self.scales:
            x = x * self.scales[name]
        return x * k[f"{name}_w"][n] if p.norm_weight else x

    def _step_size(self, t: Expr) -> tuple[Expr, Expr]:
        """dt log2(e) and dt u."""
        p, k = self.p, self.k
        dt = self.dt if p.dt_rank else k["dt"][t * p.lddt + self.d]
        dt = let(dt + k["dt_bias"][self.d] if p.dt_bias else dt)
        dt = let(softplus(dt)) if p.dt_softplus else dt
        if p.dt_min > 0.0:
            dt = let(tirx.Select(dt < f32(p.dt_min), f32(p.dt_min), dt))
        if math.isfinite(p.dt_max):
            dt = let(tirx.Select(dt > f32(p.dt_max), f32(p.dt_max), dt))
        return let(dt * f32(LOG2_E)), let(dt * k["u"][t * p.ldu + self.d])

    def _token(self, t0: Expr, u: Expr) -> None:
        p = self.p
        t, at = t0 + u, u * CHANNELS + self.lane
        exponent, dtu = (let(s[at]) for s in self.steps) if p.T > 1 else self._step_size(t)
        total = local(1)
        store(total, 0, f32(0.0))
        for i, n, inside in self._states():
            with when(inside):
                s = let(T.exp2(exponent * self.A[i]) * self.S[i] + dtu * self._input("B", t, n))
                store(self.S, i, s)
                store(total, 0, total[0] + s * self._input("C", t, n))
        store(self.sums, (u * self.parts + self.part) * CHANNELS + self.lane, total[0])

    def _finish(self, t0: Expr, u: Expr, inside: Expr | bool) -> None:
        p, k, d = self.p, self.k, self.d
        t, result = t0 + u, local(1)
        store(result, 0, f32(0.0))
        with when(self.exists), when(inside):
            y = self.sums[u * self.parts * CHANNELS + self.lane]
            for part in range(1, self.parts):
                y = y + self.sums[(u * self.parts + part) * CHANNELS + self.lane]
            if p.skip:
                y = y + k["Dskip"][d] * k["u"][t * p.ldu + d]
            if p.gate:
                y = y * silu(let(k["z"][t * p.ldz + d]))
            store(result, 0, y)
            if p.quant is None:
                store(k["y"], t * p.D + d, result[0])
        if p.quant is not None:  # D is a multiple of 64: every channel exists
            write_block(k, t * blocks(p.D) + d // BLOCK, result[0], p.quant, self.scratch, inside)
