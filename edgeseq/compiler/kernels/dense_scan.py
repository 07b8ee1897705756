"""A dense state space model per channel over T tokens, the state in place (ai.edgeseq.DenseScan); lanes are channels.

x[i] <- sum_j a[i,j] x[j] + b[i] u;  y = sum_i c[i] x[i] + d u.
One block is 16 channels: its matrices are a stream of N*N vectors, read once a token (from cache after the first).
"""

from __future__ import annotations

from dataclasses import dataclass

from . import Built
from ._emit import LANES, Expr, kernel, let, load, local, loop, splat, split_blocks, store

COLUMNS = 8  # products added in registers between two accesses to the sum


@dataclass(frozen=True)
class DenseScan:
    """T tokens, C channels, N states; ldu: floats between tokens of u.

    a, b, c: packed columns16 of [N*N,C] and [N,C]: [ceil(C/16)][rows][16].
    """

    T: int
    C: int
    N: int
    ldu: int
    skip: bool = False

    @property
    def args(self) -> tuple[str, ...]:
        return ("u", "a", "b", "c", *(("d",) if self.skip else ()), "past", "y")


def build(name: str, p: DenseScan) -> Built:
    padded = -(-p.C // LANES) * LANES
    sizes = {
        "u": (p.T - 1) * p.ldu + p.C, "a": padded * p.N * p.N, "b": padded * p.N, "c": padded * p.N, "d": p.C,
        "past": p.N * p.C, "y": p.T * p.C,
    }  # fmt: skip
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args]) as kern:
        old, new, total, out = local(p.N * LANES), local(p.N * LANES), local(LANES), local(LANES)

        def strip(c: Expr, lanes: int) -> None:
            group = c // LANES * (p.N * LANES)
            loop(p.N, lambda i: store(old, i * LANES, load(kern["past"], i * p.C + c, lanes), lanes))

            def token(t: Expr) -> None:
                u = let(load(kern["u"], t * p.ldu + c, lanes))
                store(out, 0, load(kern["d"], c, lanes) * u if p.skip else splat(0.0, lanes), lanes)

                def row(i: Expr) -> None:
                    at = (group + i * LANES) * p.N
                    store(total, 0, load(kern["b"], group + i * LANES, lanes) * u, lanes)

                    def columns(first: Expr, count: int) -> None:
                        acc = load(total, 0, lanes)
                        for j in range(count):
                            column = (first + j) * LANES
                            acc = acc + load(kern["a"], at + column, lanes) * load(old, column, lanes)
                        store(total, 0, acc, lanes)

                    loop(p.N // COLUMNS, lambda g: columns(g * COLUMNS, COLUMNS))
                    if p.N % COLUMNS:
                        columns(p.N // COLUMNS * COLUMNS, p.N % COLUMNS)
                    x = let(load(total, 0, lanes))
                    store(new, i * LANES, x, lanes)
                    store(out, 0, load(out, 0, lanes) + load(kern["c"], group + i * LANES, lanes) * x, lanes)

                loop(p.N, row)
                loop(p.N, lambda i: store(old, i * LANES, load(new, i * LANES, lanes), lanes))
                store(kern["y"], t * p.C + c, load(out, 0, lanes), lanes)

            loop(p.T, token)
            loop(p.N, lambda i: store(kern["past"], i * p.C + c, load(old, i * LANES, lanes), lanes))

        grid = split_blocks(kern.block, p.C, LANES, lambda first, count: strip(first, count))
    return Built(kern.func, grid)
