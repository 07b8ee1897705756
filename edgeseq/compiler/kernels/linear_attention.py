"""Every recurrence with a matrix state S[K,V] per head, over T tokens: LinearAttention, Retention, DPLRScan.

  S <- D S + k (x) v                         o = scale q^T S       erase "none"
  S <- D S + k (x) beta (v - k^T D S)                              erase "key": the delta rules
  S <- D S + b (a^T S) + k (x) v                                   erase "free": DPLR

D = e^decay is one number per head ("constant" over time or per token: "head") or one per key channel ("key").
Lanes are value channels; a block owns one strip of V of one head, reads it once and writes it once. Without erasing, a
tile of tokens passes through each row while it is in registers. With erasing, what is read has to be summed over all
keys before any row changes: the strip stays in scratch, and one pass updates it for a token and reads it for the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..tvm_api import T
from . import Built
from ._emit import LANES, Buffer, Expr, Kernel, kernel, let, load, local, loop, pieces, splat, store
from ._tiles import accumulators, tiles

if TYPE_CHECKING:
    from ..targets import Target

Decay = Literal["none", "constant", "head", "key"]
SCRATCH = 1 << 14  # floats of state that an erasing block holds on its thread's stack


@dataclass(frozen=True)
class LinearAttention:
    """T tokens, H heads of the state, K key and V value channels per head; ld*: floats between tokens.

    Hq, Hk: heads of queries and keys. Fewer than H: each serves H/Hq neighbours; more queries: Hq/H share a state.
    tile: tokens that pass through a row together, and vectors of a block; values and outputs stay in registers.
    """

    T: int
    H: int
    K: int
    V: int
    Hq: int
    Hk: int
    ldq: int
    ldk: int
    ldv: int
    decay: Decay = "none"
    erase: Literal["none", "key", "free"] = "none"
    ldg: int = 0
    ldb: int = 0
    lda: int = 0
    scale: float = 1.0
    tile: tuple[int, int] = (3, 4)

    @property
    def args(self) -> tuple[str, ...]:
        decay = () if self.decay == "none" else ("decay",)
        erase = {"none": (), "key": ("beta",), "free": ("a", "b")}[self.erase]
        return ("q", "k", "v", *decay, *erase, "past", "o")

    @property
    def group(self) -> int:
        """Queries that read one state."""
        return max(1, self.Hq // self.H)

    @property
    def strip(self) -> int:
        """Vectors of a block: as many as stay in registers or L1, a divisor of the whole vectors of V."""
        one = 2 if self.erase != "none" else 4  # at T = 1, however few the registers
        wide = self.tile[1] if self.T > 1 and self.erase == "none" else max(one, self.tile[1])
        while self.erase != "none" and wide > 1 and self.K * wide * LANES > SCRATCH:
            wide //= 2
        return next(n for n in (4, 2, 1) if n <= wide and self.V // LANES % n == 0)

    def size(self, name: str) -> int:
        """Floats that argument `name` spans."""
        rows = {
            "q": (self.ldq, self.Hq * self.K), "k": (self.ldk, self.Hk * self.K), "v": (self.ldv, self.H * self.V),
            "a": (self.lda, self.H * self.K), "b": (self.ldb, self.H * self.K), "beta": (self.ldb, self.H),
            "o": (self.group * self.H * self.V,) * 2,
            "decay": (self.ldg, self.H * self.K if self.decay == "key" else self.H),
        }  # fmt: skip
        if name == "past":
            return self.H * self.K * self.V
        if name == "decay" and self.decay == "constant":
            return self.H
        ld, width = rows[name]
        return (self.T - 1) * ld + width


def token_tile(gemm_tile: tuple[int, int]) -> tuple[int, int]:
    """`tile` for registers that hold so many accumulators of a product: wide strips, as their rows lie together."""
    tokens, groups = gemm_tile
    return 3, (4 if tokens * groups >= 24 else 1)


def candidates(p: LinearAttention, target: Target) -> list[LinearAttention]:
    """What tuning may choose from: tokens by vectors whose values and outputs stay in registers."""
    if p.T == 1 or p.erase != "none":
        return [p]
    vectors, own = max(1, p.V // LANES), (max(1, p.tile[0] // p.group), p.strip)
    found = tiles(p.T, vectors, accumulators(target.features) // (1 + p.group))
    others = [(t, wide) for t, wide in found if (t, wide) != own and vectors % wide == 0]
    return [p, *(replace(p, tile=(t * p.group, wide)) for t, wide in others)]


def build(name: str, p: LinearAttention) -> Built:
    """A head has V // (16 strip) blocks of whole vectors and, where V is no multiple of 16, one of the rest."""
    whole, rest = p.V // LANES // p.strip, p.V % LANES
    strips = whole + (1 if rest else 0)
    with kernel(name, [(a, "float32", p.size(a)) for a in p.args]) as kern:
        head, index = let(kern.block // strips), let(kern.block % strips)

        def full() -> None:
            _emit(_Block(kern, p, head, index * (p.strip * LANES), p.strip, LANES))

        def tail() -> None:
            _emit(_Block(kern, p, head, p.V - rest, 1, rest))

        if not whole:
            tail()
        elif not rest:
            full()
        else:
            with T.If(index < whole):
                with T.Then():
                    full()
                with T.Else():
                    tail()
    return Built(kern.func, p.H * strips)


def _emit(block: _Block) -> None:
    p = block.p
    if p.erase != "none":
        _Eraser(block).run()
        return
    tokens = max(1, p.tile[0] // p.group)
    whole = p.T // tokens
    tile = _Tile(block, min(tokens, p.T))
    loop(whole, lambda i: tile.run(i * tokens, tokens))
    if p.T % tokens:
        tile.run(whole * tokens, p.T % tokens)


class _Block:
    """`vectors` vectors of `lanes` value channels from v0 on of one head: where its parts of every argument lie."""

    def __init__(self, kern: Kernel, p: LinearAttention, head: Expr, v0: Expr, vectors: int, lanes: int) -> None:
        self.p, self.kern, self.head, self.lanes = p, kern, head, lanes
        self.v0 = v0 if isinstance(v0, int) else let(v0)
        self.vectors = range(vectors)
        self.constant = let(T.exp(kern["decay"][head])) if p.decay == "constant" else None

    def key(self, t: Expr) -> Expr:
        return t * self.p.ldk + self.head // (self.p.H // self.p.Hk) * self.p.K

    def query(self, t: Expr, g: int) -> Expr:
        p = self.p
        head = self.head * p.group + g if p.Hq >= p.H else self.head // (p.H // p.Hq)
        return t * p.ldq + head * p.K

    def row(self, c: Expr, r: int) -> Expr:
        return (self.head * self.p.K + c) * self.p.V + self.v0 + r * self.lanes

    def value(self, t: Expr, r: int) -> Expr:
        return load(self.kern["v"], t * self.p.ldv + self.head * self.p.V + self.v0 + r * self.lanes, self.lanes)

    def write(self, t: Expr, g: int, r: int, o: Expr) -> None:
        p = self.p
        at = (t * p.H * p.group + self.head * p.group + g) * p.V + self.v0 + r * self.lanes
        store(self.kern["o"], at, o * splat(p.scale, self.lanes), self.lanes)

    def splat(self, name: str, at: Expr) -> Expr:
        return splat(self.kern[name][at], self.lanes)

    def decays(self, t: Expr, into: Buffer, at: Expr) -> None:
        """e^decay of token t: one number, or K of them."""
        p = self.p
        if p.decay == "head":
            store(into, at, T.exp(self.kern["decay"][t * p.ldg + self.head]), 1)
        elif p.decay == "key":
            for c, n in pieces(p.K):
                store(into, at + c, T.exp(load(self.kern["decay"], t * p.ldg + self.head * p.K + c, n)), n)

    def decayed(self, s: Expr, keep: Buffer, at: Expr, c: Expr) -> Expr:
        """s after one token; `keep` holds its decays from `at` on."""
        kind = self.p.decay
        if kind == "none":
            return s
        factor = self.constant if kind == "constant" else keep[at + c if kind == "key" else at]
        return splat(factor, self.lanes) * s


class _Tile:
    """No erasing: up to `tokens` tokens for each row of the state while it is in registers."""

    def __init__(self, block: _Block, tokens: int) -> None:
        p, vectors = block.p, len(block.vectors)
        self.block, self.per_token = block, p.K if p.decay == "key" else 1
        self.value = local(tokens * vectors * LANES)
        self.out = local(tokens * p.group * vectors * LANES)
        self.keep = local(tokens * self.per_token)

    def run(self, t0: Expr, count: int) -> None:
        b, lanes, group = self.block, self.block.lanes, self.block.p.group
        index = [(t, r, (t * len(b.vectors) + r) * LANES) for t in range(count) for r in b.vectors]
        for t in range(count):
            b.decays(t0 + t, self.keep, t * self.per_token)
        for t, r, at in index:
            store(self.value, at, b.value(t0 + t, r), lanes)
            for g in range(group):
                store(self.out, at * group + g * LANES, splat(0.0, lanes), lanes)
        with T.serial(b.p.K) as c:
            for r in b.vectors:
                self._row(c, r, t0, count)
        for t, r, at in index:
            for g in range(group):
                b.write(t0 + t, g, r, load(self.out, at * group + g * LANES, lanes))

    def _row(self, c: Expr, r: int, t0: Expr, count: int) -> None:
        b, lanes, group = self.block, self.block.lanes, self.block.p.group
        s = load(b.kern["past"], let(b.row(c, r)), lanes)
        for t in range(count):
            at = (t * len(b.vectors) + r) * LANES
            key = b.splat("k", b.key(t0 + t) + c)
            s = let(b.decayed(s, self.keep, t * self.per_token, c) + key * load(self.value, at, lanes))
            for g in range(group):
                to = at * group + g * LANES
                store(self.out, to, load(self.out, to, lanes) + b.splat("q", b.query(t0 + t, g) + c) * s, lanes)
        store(b.kern["past"], b.row(c, r), s, lanes)


class _Eraser:
    """Erasing: S in scratch; `read` gathers what the next token reads from it while this one updates it."""

    def __init__(self, block: _Block) -> None:
        p, width = block.p, len(block.vectors) * LANES
        self.block, self.width = block, width
        self.S = local(p.K * width)
        self.read, self.written, self.erased = local(width), local(width), local(width)
        self.out = local(p.group * width)
        self.per_token = p.K if p.decay == "key" else 1
        self.keep = local(2 * self.per_token)  # of even and of odd tokens
        self.ahead = local(p.K)  # what the next token reads with, where it is not in memory already

    def run(self) -> None:
        p, past = self.block.p, self.block.kern["past"]
        self._prepare(0)
        with T.serial(p.K) as c:
            for r in self.block.vectors:
                s = let(load(past, self.block.row(c, r), self.block.lanes))
                store(self.S, c * self.width + r * LANES, s, self.block.lanes)
                self._look(0, c, r, s)

        def inner(t: Expr) -> None:
            self._take(t)
            self._prepare(t + 1)
            self._update(t, lambda c, r, s: self._advance(t, c, r, s))

        loop(p.T - 1, inner)
        self._take(p.T - 1)
        lanes = self.block.lanes
        self._update(p.T - 1, lambda c, r, s: store(past, self.block.row(c, r), s, lanes))

    def _advance(self, t: Expr, c: Expr, r: int, s: Expr) -> None:
        store(self.S, c * self.width + r * LANES, s, self.block.lanes)
        self._look(t + 1, c, r, s)

    def _slot(self, t: Expr) -> Expr:
        return t % 2 * self.per_token

    def _prepare(self, t: Expr) -> None:
        """Before anything is read for token t."""
        b, p = self.block, self.block.p
        b.decays(t, self.keep, self._slot(t))
        if p.erase == "key" and p.decay == "key":
            for c, n in pieces(p.K):
                product = load(self.keep, self._slot(t) + c, n) * load(b.kern["k"], b.key(t) + c, n)
                store(self.ahead, c, product, n)
        for r in b.vectors:
            store(self.read, r * LANES, splat(0.0, b.lanes), b.lanes)

    def _look(self, t: Expr, c: Expr, r: int, s: Expr) -> None:
        """Add row c to what token t reads: k^T D S (a decay of the head is multiplied at the end) or a^T S."""
        b, p = self.block, self.block.p
        if p.erase == "free":
            with_ = b.splat("a", t * p.lda + b.head * p.K + c)
        elif p.decay == "key":
            with_ = splat(self.ahead[c], b.lanes)
        else:
            with_ = b.splat("k", b.key(t) + c)
        store(self.read, r * LANES, load(self.read, r * LANES, b.lanes) + with_ * s, b.lanes)

    def _take(self, t: Expr) -> None:
        """Turn what token t has read into what it writes."""
        b, p = self.block, self.block.p
        for r in b.vectors:
            at = r * LANES
            read, value = load(self.read, at, b.lanes), b.value(t, r)
            if p.erase == "key":
                read = read if p.decay == "key" else b.decayed(read, self.keep, self._slot(t), 0)
                value = b.splat("beta", t * p.ldb + b.head) * (value - read)
            else:
                store(self.erased, at, read, b.lanes)
            store(self.written, at, value, b.lanes)
            for g in range(p.group):
                store(self.out, at * p.group + g * LANES, splat(0.0, b.lanes), b.lanes)

    def _update(self, t: Expr, then: Callable[[Expr, int, Expr], None]) -> None:
        """One pass over the rows for token t, `then(c, r, new row)` after each; its output is complete behind it."""
        b, p, lanes = self.block, self.block.p, self.block.lanes
        with T.serial(p.K) as c:
            for r in b.vectors:
                s = b.decayed(load(self.S, c * self.width + r * LANES, lanes), self.keep, self._slot(t), c)
                s = s + b.splat("k", b.key(t) + c) * load(self.written, r * LANES, lanes)
                if p.erase == "free":
                    s = s + b.splat("b", t * p.ldb + b.head * p.K + c) * load(self.erased, r * LANES, lanes)
                s = let(s)
                for g in range(p.group):
                    at = (r * p.group + g) * LANES
                    store(self.out, at, load(self.out, at, lanes) + b.splat("q", b.query(t, g) + c) * s, lanes)
                then(c, r, s)
        for r in b.vectors:
            for g in range(p.group):
                b.write(t, g, r, load(self.out, (r * p.group + g) * LANES, lanes))
