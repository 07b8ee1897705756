"""Rotary position embedding (Su et al. 2021, eq. 34) on x[T,H,d] with cos, sin [T,d/2].

half-split: pairs (i, i + d/2);  interleaved: pairs (2i, 2i + 1).  y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import Expr, kernel, let, load, pieces


@dataclass(frozen=True)
class Rotary:
    T: int
    H: int
    d: int
    ldx: int
    interleaved: bool
    args = ("x", "cos", "sin", "y")


def build(name: str, p: Rotary) -> Built:
    half = p.d // 2
    params = [("x", (p.T - 1) * p.ldx + p.H * p.d), ("cos", p.T * half), ("sin", p.T * half), ("y", p.T * p.H * p.d)]
    with kernel(name, [(n, "float32", size) for n, size in params]) as k:
        with T.serial(p.H) as h:
            source = let(k.block * p.ldx + h * p.d)
            target = let((k.block * p.H + h) * p.d)

            def at(base: Expr, i: int, lanes: int, second: bool) -> Expr:
                if not p.interleaved:
                    start = base + (half if second else 0) + i
                    return start if lanes == 1 else T.ramp(start, 1, lanes)
                start = base + 2 * i + (1 if second else 0)
                return start if lanes == 1 else T.ramp(start, 2, lanes)

            for i, lanes in pieces(half):
                c = let(load(k["cos"], k.block * half + i, lanes))
                s = let(load(k["sin"], k.block * half + i, lanes))
                x1 = let(k["x"][at(source, i, lanes, False)])
                x2 = let(k["x"][at(source, i, lanes, True)])
                T.buffer_store(k["y"], x1 * c - x2 * s, [at(target, i, lanes, False)])
                T.buffer_store(k["y"], x2 * c + x1 * s, [at(target, i, lanes, True)])
    return Built(k.func, p.T)
