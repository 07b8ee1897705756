"""Mamba's selective scan (Gu and Dao 2023, eq. 2 with exp(dt A) for A and dt B for B), gate and skip included.

dt <- clip(softplus(dt + dt_bias));  S[n,d] <- exp(dt[d] A[n,d]) S[n,d] + dt[d] u[d] B[n]
y[d] = (sum_n C[n] S[n,d] + Dskip[d] u[d]) silu(z[d])
Lanes are channels; the state of a block stays in registers or first-level cache over all tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..tvm_api import T, tirx
from . import Built
from ._emit import LANES, Expr, kernel, let, load, local, loop, silu, softplus, splat, split_blocks, store


@dataclass(frozen=True)
class SelectiveScan:
    """T tokens, D channels, N states; ld*: floats between tokens of each input."""

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

    @property
    def args(self) -> tuple[str, ...]:
        optional = [a for a, on in (("Dskip", self.skip), ("z", self.gate), ("dt_bias", self.dt_bias)) if on]
        return ("u", "dt", "A", "B", "C", *optional, "past", "y")


def build(name: str, p: SelectiveScan) -> Built:
    rows = {"u": (p.ldu, p.D), "dt": (p.lddt, p.D), "B": (p.ldB, p.N), "C": (p.ldC, p.N), "z": (p.ldz, p.D)}
    sizes = {a: (p.T - 1) * ld + n for a, (ld, n) in rows.items()}
    sizes |= {"A": p.N * p.D, "Dskip": p.D, "dt_bias": p.D, "past": p.N * p.D, "y": p.T * p.D}
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args]) as k:
        state = local(p.N * LANES)
        acc = local(LANES)

        def channels(d: Expr, lanes: int) -> None:
            for n in range(p.N):
                store(state, n * LANES, load(k["past"], n * p.D + d, lanes), lanes)
            loop(p.T, lambda t: token(t, d, lanes))
            for n in range(p.N):
                store(k["past"], n * p.D + d, load(state, n * LANES, lanes), lanes)

        def step_size(t: Expr, d: Expr, lanes: int) -> Expr:
            dt = load(k["dt"], t * p.lddt + d, lanes)
            if p.dt_bias:
                dt = dt + load(k["dt_bias"], d, lanes)
            dt = let(softplus(dt, lanes) if p.dt_softplus else dt)
            if p.dt_min > 0.0:
                dt = let(tirx.Select(dt < splat(p.dt_min, lanes), splat(p.dt_min, lanes), dt))
            if math.isfinite(p.dt_max):
                dt = let(tirx.Select(dt > splat(p.dt_max, lanes), splat(p.dt_max, lanes), dt))
            return dt

        def token(t: Expr, d: Expr, lanes: int) -> None:
            u = let(load(k["u"], t * p.ldu + d, lanes))
            dt = step_size(t, d, lanes)
            dtu = let(dt * u)
            store(acc, 0, splat(0.0, lanes), lanes)
            for n in range(p.N):
                decay = T.exp(dt * load(k["A"], n * p.D + d, lanes))
                s = decay * load(state, n * LANES, lanes) + dtu * splat(k["B"][t * p.ldB + n], lanes)
                store(state, n * LANES, s, lanes)
                s = load(state, n * LANES, lanes)
                store(acc, 0, load(acc, 0, lanes) + s * splat(k["C"][t * p.ldC + n], lanes), lanes)
            y = load(acc, 0, lanes)
            if p.skip:
                y = y + load(k["Dskip"], d, lanes) * u
            if p.gate:
                y = y * silu(let(load(k["z"], t * p.ldz + d, lanes)))
            store(k["y"], t * p.D + d, y, lanes)

        grid = split_blocks(k.block, p.D, LANES, channels)
    return Built(k.func, grid)
