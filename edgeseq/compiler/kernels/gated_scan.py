"""h = exp(log_a) h + x over T tokens (Griffin, De et al. 2024, section 2.4); lanes are channels, the state [D] stays in
registers over all tokens and is updated in place."""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, Expr, kernel, let, load, local, loop, split_blocks, store

PER_BLOCK = 4 * LANES  # channels


@dataclass(frozen=True)
class GatedScan:
    """T tokens, D channels; ld*: floats between tokens."""

    T: int
    D: int
    ldx: int
    ldl: int
    args = ("x", "log_a", "past", "h")


def build(name: str, p: GatedScan) -> Built:
    sizes = {"x": (p.T - 1) * p.ldx + p.D, "log_a": (p.T - 1) * p.ldl + p.D, "past": p.D, "h": p.T * p.D}
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args]) as k:
        state = local(LANES)

        def strip(d: Expr, lanes: int) -> None:
            store(state, 0, load(k["past"], d, lanes), lanes)

            def token(t: Expr) -> None:
                decay = let(T.exp(load(k["log_a"], t * p.ldl + d, lanes)))
                h = let(decay * load(state, 0, lanes) + load(k["x"], t * p.ldx + d, lanes))
                store(state, 0, h, lanes)
                store(k["h"], t * p.D + d, h, lanes)

            loop(p.T, token)
            store(k["past"], d, load(state, 0, lanes), lanes)

        def block(first: Expr, count: int) -> None:
            for at in range(0, count, LANES):
                strip(first + at, min(LANES, count - at))

        grid = split_blocks(k.block, p.D, PER_BLOCK, block)
    return Built(k.func, grid)
