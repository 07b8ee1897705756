"""RWKV-4's weighted average over T tokens with its state in place (see kernels/wkv4): a thread per channel."""

from __future__ import annotations

from typing import Any

from ..kernels.wkv4 import Wkv4
from ..tvm_api import T
from . import Built
from ._emit import Expr, blocks_of, elementwise, f32, kernel, let, local, loop, store

THREADS = 32


def build(name: str, p: Wkv4, gpu: Any) -> Built:
    sizes = {
        "k": (p.T - 1) * p.ldk + p.C, "v": (p.T - 1) * p.ldv + p.C, "time_decay": p.C, "time_first": p.C,
        "past": 3 * p.C, "o": p.T * p.C,
    }  # fmt: skip
    grid = blocks_of(p.C, THREADS)
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args], grid, THREADS, gpu) as kern:

        def channel(c: Expr) -> None:
            state = local(3)  # a, b, p
            for row in range(3):
                store(state, row, kern["past"][row * p.C + c])
            w, u = let(f32(0.0) - T.exp(kern["time_decay"][c])), let(kern["time_first"][c])

            def token(t: Expr) -> None:
                key, value = let(kern["k"][t * p.ldk + c]), let(kern["v"][t * p.ldv + c])
                a, b, peak = state[0], state[1], state[2]
                _, num, den = _blend(peak, let(u + key), a, b, value)
                store(kern["o"], t * p.C + c, num / den)
                top, num, den = _blend(let(peak + w), key, a, b, value)
                for row, new in enumerate((num, den, top)):
                    store(state, row, new)

            loop(p.T, token)
            for row in range(3):
                store(kern["past"], row * p.C + c, state[row])

        elementwise(kern, grid * THREADS, p.C, channel)
    return Built(kern.func, grid, THREADS)


def _blend(old: Expr, new: Expr, a: Expr, b: Expr, value: Expr) -> tuple[Expr, Expr, Expr]:
    """The larger exponent, and (a, b) e^old + (value, 1) e^new relative to it."""
    top = let(T.max(old, new))
    before, now = let(T.exp(old - top)), let(T.exp(new - top))
    return top, let(before * a + now * value), let(before * b + now)
