"""A dense state space model per channel over T tokens, the state in place (ai.edgeseq.DenseScan); lanes are channels.

x[i] <- sum_j a[i,j] x[j] + b[i] u;  y = sum_i c[i] x[i] + d u.
One block is 16 channels: its matrices are a stream of N*N vectors, read once a token (from cache after the first).
"""

from __future__ import annotations

from dataclasses import dataclass

from . import Built
from ._emit import LANES, Expr, kernel, let, load, local, loop, splat, split_blocks, store

ROWS = 4  # sums in registers at a time


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
        old, new, sums, out = local(p.N * LANES), local(p.N * LANES), local(ROWS * LANES), local(LANES)

        def strip(c: Expr, lanes: int) -> None:
            group = c // LANES * (p.N * LANES)
            loop(p.N, lambda i: store(old, i * LANES, load(kern["past"], i * p.C + c, lanes), lanes))

            def token(t: Expr) -> None:
                u = let(load(kern["u"], t * p.ldu + c, lanes))
                store(out, 0, load(kern["d"], c, lanes) * u if p.skip else splat(0.0, lanes), lanes)

                def rows(first: Expr, count: int) -> None:
                    at = [(group + (first + i) * LANES) * p.N for i in range(count)]
                    for i in range(count):
                        fed = load(kern["b"], group + (first + i) * LANES, lanes) * u
                        store(sums, i * LANES, fed, lanes)

                    def column(j: Expr) -> None:
                        x = let(load(old, j * LANES, lanes))
                        for i in range(count):
                            product = load(kern["a"], at[i] + j * LANES, lanes) * x
                            store(sums, i * LANES, load(sums, i * LANES, lanes) + product, lanes)

                    loop(p.N, column)
                    for i in range(count):
                        x = let(load(sums, i * LANES, lanes))
                        store(new, (first + i) * LANES, x, lanes)
                        read = load(kern["c"], group + (first + i) * LANES, lanes) * x
                        store(out, 0, load(out, 0, lanes) + read, lanes)

                loop(p.N // ROWS, lambda g: rows(g * ROWS, ROWS))
                if p.N % ROWS:
                    rows(p.N // ROWS * ROWS, p.N % ROWS)
                loop(p.N, lambda i: store(old, i * LANES, load(new, i * LANES, lanes), lanes))
                store(kern["y"], t * p.C + c, load(out, 0, lanes), lanes)

            loop(p.T, token)
            loop(p.N, lambda i: store(kern["past"], i * p.C + c, load(old, i * LANES, lanes), lanes))

        grid = split_blocks(kern.block, p.C, LANES, lambda first, count: strip(first, count))
    return Built(kern.func, grid)
