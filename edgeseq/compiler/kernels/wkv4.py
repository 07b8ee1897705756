"""RWKV-4's weighted average over T tokens (Peng et al. 2023, appendix D); lanes are channels.

o = (e^(p-m) a + e^(u+k-m) v) / (e^(p-m) b + e^(u+k-m)), m = max(p, u + k); then a, b, p take in k and v, decayed by
w = -exp(time_decay). The state [3,C] (a, b, p) stays in registers over all tokens and is updated in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, Buffer, Expr, kernel, let, load, local, loop, splat, split_blocks, store

PER_BLOCK = 4 * LANES  # channels


@dataclass(frozen=True)
class Wkv4:
    """T tokens, C channels; ld*: floats between tokens."""

    T: int
    C: int
    ldk: int
    ldv: int
    args = ("k", "v", "time_decay", "time_first", "past", "o")


def build(name: str, p: Wkv4) -> Built:
    sizes = {
        "k": (p.T - 1) * p.ldk + p.C, "v": (p.T - 1) * p.ldv + p.C, "time_decay": p.C, "time_first": p.C,
        "past": 3 * p.C, "o": p.T * p.C,
    }  # fmt: skip
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args]) as kern:
        state, fixed = local(3 * LANES), local(2 * LANES)  # a, b, p; w, u

        def strip(c: Expr, lanes: int) -> None:
            for row in range(3):
                store(state, row * LANES, load(kern["past"], row * p.C + c, lanes), lanes)
            store(fixed, 0, splat(0.0, lanes) - T.exp(load(kern["time_decay"], c, lanes)), lanes)
            store(fixed, LANES, load(kern["time_first"], c, lanes), lanes)

            def token(t: Expr) -> None:
                key = let(load(kern["k"], t * p.ldk + c, lanes))
                value = let(load(kern["v"], t * p.ldv + c, lanes))
                a, b, peak = (load(state, row * LANES, lanes) for row in range(3))
                _, num, den = _blend(peak, let(load(fixed, LANES, lanes) + key), a, b, value)
                store(kern["o"], t * p.C + c, num / den, lanes)
                top, num, den = _blend(let(peak + load(fixed, 0, lanes)), key, a, b, value)
                for row, new in enumerate((num, den, top)):
                    store(state, row * LANES, new, lanes)

            loop(p.T, token)
            for row in range(3):
                store(kern["past"], row * p.C + c, load(state, row * LANES, lanes), lanes)

        def block(first: Expr, count: int) -> None:
            for at in range(0, count, LANES):
                strip(first + at, min(LANES, count - at))

        grid = split_blocks(kern.block, p.C, PER_BLOCK, block)
    return Built(kern.func, grid)


def _blend(old: Expr, new: Expr, a: Buffer, b: Buffer, value: Expr) -> tuple[Expr, Expr, Expr]:
    """The larger exponent, and (a, b) e^old + (value, 1) e^new relative to it."""
    top = let(T.max(old, new))
    before, now = let(T.exp(old - top)), let(T.exp(new - top))
    return top, let(before * a + now * value), let(before * b + now)
