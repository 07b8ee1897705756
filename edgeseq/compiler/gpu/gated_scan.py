"""h = exp(log_a) h + x over T tokens with its state in place (see kernels/gated_scan): a thread per channel."""

from __future__ import annotations

from typing import Any

from ..kernels.gated_scan import GatedScan
from ..tvm_api import T
from . import Built
from ._emit import Expr, blocks_of, elementwise, kernel, local, loop, store

THREADS = 32


def build(name: str, p: GatedScan, gpu: Any) -> Built:
    sizes = {"x": (p.T - 1) * p.ldx + p.D, "log_a": (p.T - 1) * p.ldl + p.D, "past": p.D, "h": p.T * p.D}
    grid = blocks_of(p.D, THREADS)
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args], grid, THREADS, gpu) as k:

        def channel(d: Expr) -> None:
            state = local(1)
            store(state, 0, k["past"][d])

            def token(t: Expr) -> None:
                store(state, 0, T.exp(k["log_a"][t * p.ldl + d]) * state[0] + k["x"][t * p.ldx + d])
                store(k["h"], t * p.D + d, state[0])

            loop(p.T, token)
            store(k["past"], d, state[0])

        elementwise(k, grid * THREADS, p.D, channel)
    return Built(k.func, grid, THREADS)
