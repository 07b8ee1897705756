"""Products of one token that do not depend on one another, in one launch: each has its own range of blocks.

Only what lies before and behind the barriers is chosen by the block (see `choose`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from . import Built, linear, linear_q
from ._emit import choose, kernel, local, reduce_rows, rows_scratch, zero

MODULES: dict[str, Any] = {"linear": linear, "linear_q": linear_q}


@dataclass(frozen=True)
class Joined:
    """op: "linear" or "linear_q"; parts: parameters of each, all of as many registers (see Gemv.each).

    Arguments of the parts follow one another, each named with its part's number behind it.
    """

    op: str
    parts: tuple[Any, ...]

    @property
    def args(self) -> tuple[str, ...]:
        return tuple(f"{a}{i}" for i, p in enumerate(self.parts) for a in p.args)

    @property
    def label(self) -> str:
        """The number of parts, their rows, and the first's sizes, as a C name."""
        from ..codegen import describe

        rows = "_".join(str(p.M) for p in self.parts)
        return f"joined_m{rows}_{describe(self.op, self.parts[0])}"


def build(name: str, p: Joined, gpu: Any) -> Built:
    module = MODULES[p.op]
    counts = [-(-part.M // linear.ROWS) for part in p.parts]
    grid = sum(counts)
    threads = linear.gemv_threads(gpu, grid, min(module.group_bytes(part) for part in p.parts))
    starts = [0, *accumulate(counts)][:-1]
    params = [(f"{n}{i}", d, size) for i, part in enumerate(p.parts) for n, d, size in module.parameters(part)]
    with kernel(name, params, grid, threads, gpu, early=True) as k:
        products = [
            module.Gemv(k.part(i, part.args, start), part)
            for i, (part, start) in enumerate(zip(p.parts, starts, strict=True))
        ]
        each, across = products[0].each, products[0].across
        acc = local(each)
        zero(acc, each)
        choose(k.block, starts, [partial(g.accumulate, acc) for g in products])
        total = reduce_rows(k, acc, each, across, rows_scratch(k, each, across))
        choose(k.block, starts, [partial(g.finish, total) for g in products])
    return Built(k.func, grid, threads)
