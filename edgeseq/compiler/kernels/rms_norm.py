"""y[R,D] = x[R,D] / sqrt(mean(x^2) + eps) * w[D]; statistics in float32 (Zhang and Sennrich 2019, eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, horizontal_sum, kernel, let, load, local, pieces, splat, store


@dataclass(frozen=True)
class RmsNorm:
    """R rows of D; ldx: floats between rows of x; per_block: rows of one block."""

    R: int
    D: int
    ldx: int
    eps: float
    weight: bool

    @property
    def args(self) -> tuple[str, ...]:
        return ("x", "w", "y") if self.weight else ("x", "y")


def build(name: str, p: RmsNorm) -> Built:
    sizes = {"x": (p.R - 1) * p.ldx + p.D, "w": p.D, "y": p.R * p.D}
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args]) as k:
        whole, rest = divmod(p.D, LANES)
        acc = local(LANES)
        scratch = local(LANES)
        store(acc, 0, splat(0.0))
        row = let(k.block * p.ldx)
        if whole:
            with T.serial(whole) as i:
                v = let(load(k["x"], row + i * LANES))
                store(acc, 0, load(acc, 0) + v * v)
        if rest:
            v = let(load(k["x"], row + whole * LANES, rest))
            store(acc, 0, load(acc, 0, rest) + v * v, rest)
        total = horizontal_sum(scratch, load(acc, 0))
        scale = let(T.float32(1.0) / T.sqrt(total * T.float32(1.0 / p.D) + T.float32(p.eps)))

        def put(i, lanes: int) -> None:  # type: ignore[no-untyped-def]
            y = load(k["x"], row + i, lanes) * splat(scale, lanes)
            store(k["y"], k.block * p.D + i, y * load(k["w"], i, lanes) if p.weight else y, lanes)

        if whole:
            with T.serial(whole) as i:
                put(i * LANES, LANES)
        for i, lanes in pieces(p.D)[whole:]:
            put(i, lanes)
    return Built(k.func, p.R)
