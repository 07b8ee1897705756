"""Retention, recurrent form over T tokens (Sun et al. 2023, eq. 6): S <- g S + k (x) v, o = scale q^T S.

S is [H,K,V]; lanes are value channels, a block owns one strip of V of one head. Each pass over the strip reads and
writes the state once and serves up to TOKENS tokens, so a chunk does not stream the state once per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, Expr, kernel, let, load, local, splat, store

TOKENS = 8


@dataclass(frozen=True)
class Retention:
    """T tokens, H heads, K key and V value channels per head; ld*: floats between tokens."""

    T: int
    H: int
    K: int
    V: int
    ldq: int
    ldk: int
    ldv: int
    scale: float = 1.0
    args = ("q", "k", "v", "log_decay", "past", "o")

    @property
    def strip(self) -> int:
        """Value channels of one block: whole vectors where V allows it."""
        for vectors in (4, 2, 1) if self.T == 1 else (1,):
            if self.V % (vectors * LANES) == 0:
                return vectors * LANES
        return next(n for n in range(min(self.V, LANES), 0, -1) if self.V % n == 0)


def build(name: str, p: Retention) -> Built:
    strips = p.V // p.strip
    lanes = min(p.strip, LANES)
    vectors = p.strip // lanes
    sizes = {
        "q": (p.T - 1) * p.ldq + p.H * p.K,
        "k": (p.T - 1) * p.ldk + p.H * p.K,
        "v": (p.T - 1) * p.ldv + p.H * p.V,
        "log_decay": p.H,
        "past": p.H * p.K * p.V,
        "o": p.T * p.H * p.V,
    }
    with kernel(name, [(a, "float32", sizes[a]) for a in p.args]) as kern:
        head = let(kern.block // strips)
        v0 = let((kern.block % strips) * p.strip)
        decay = let(splat(T.exp(kern["log_decay"][head]), lanes))
        value = local(TOKENS * vectors * LANES)
        out = local(TOKENS * vectors * LANES)

        def tokens(t0: int, count: int) -> None:
            for t in range(count):
                for r in range(vectors):
                    at = (t * vectors + r) * LANES
                    source = (t0 + t) * p.ldv + head * p.V + v0 + r * lanes
                    store(value, at, load(kern["v"], source, lanes), lanes)
                    store(out, at, splat(0.0, lanes), lanes)
            with T.serial(p.K) as c:
                for r in range(vectors):
                    row = let((head * p.K + c) * p.V + v0 + r * lanes)
                    s = load(kern["past"], row, lanes)
                    for t in range(count):
                        at = (t * vectors + r) * LANES
                        key = splat(kern["k"][(t0 + t) * p.ldk + head * p.K + c], lanes)
                        query = splat(kern["q"][(t0 + t) * p.ldq + head * p.K + c], lanes)
                        s = let(decay * s + key * load(value, at, lanes))
                        store(out, at, load(out, at, lanes) + query * s, lanes)
                    store(kern["past"], row, s, lanes)
            for t in range(count):
                for r in range(vectors):
                    at = (t * vectors + r) * LANES
                    target: Expr = (t0 + t) * (p.H * p.V) + head * p.V + v0 + r * lanes
                    store(kern["o"], target, load(out, at, lanes) * splat(p.scale, lanes), lanes)

        for t0 in range(0, p.T, TOKENS):
            tokens(t0, min(TOKENS, p.T - t0))
    return Built(kern.func, p.H * strips)
