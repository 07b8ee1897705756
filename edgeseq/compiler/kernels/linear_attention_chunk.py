"""The recurrences of `linear_attention` that erase nothing, for many tokens: matrix products in place of a token loop.

For n tokens at a time, with W[i,j] the product of the decays of tokens j+1..i (0 for j > i), e_i that of 0..i:
  A = (Q K^T) o W;   O = A V + (e o Q) S;   S <- e_n S + K^T (W[n] o V)
The state space dual (Dao and Gu 2024, section 6), gated linear attention (Yang et al. 2023, section 4). A decay per key
goes into the operands instead: Q becomes e o Q, and each token multiplies every earlier key, which yields its row of A
and in the end the keys of the update. Decays are only ever multiplied, as the token loop does, never summed.

A block has some heads that share queries and keys, hence Q K^T, and a strip of V of each. The strip of the state is
read once and written once per call; it lies in scratch, as keys and values do, so that no product meets far rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from ..tvm_api import T, tirx
from . import Built
from ._emit import LANES, Buffer, Expr, Kernel, kernel, let, load, local, loop, pieces, splat, store
from ._lanes import sums_of_sixteen
from .linear_attention import SCRATCH, LinearAttention

TOKENS = 32  # of a sub-chunk
FROM = 32  # tokens of a call, below which the token loop is no slower
WIDE = 128  # value channels, below which Q K^T of a single head costs more than its products save
MOST_WIDTH = 1024
HEADS = 4  # of a block, where they share queries and keys
Parts = list[tuple[int, int]]


@dataclass(frozen=True)
class LinearAttentionChunk(LinearAttention):
    """As `LinearAttention`; tile: (rows, vectors) of accumulators."""

    tile: tuple[int, int] = (6, 4)

    @property
    def n(self) -> int:
        """Tokens of a sub-chunk: a decay per key has a row of scratch for each, side by side in the lanes."""
        most = LANES if self.decay == "key" else TOKENS
        return -(-self.T // -(-self.T // most))

    @property
    def heads(self) -> int:
        """Heads of a block: neighbours with the same queries and keys."""
        alike = 1 if self.decay == "key" else gcd(self.H // min(self.H, self.Hq), self.H // self.Hk)
        most = max(1, min(HEADS, SCRATCH // (self.K * LANES)))
        return max(h for h in range(1, most + 1) if alike % h == 0)

    @property
    def width(self) -> int:
        """Value channels of a block, as many as scratch holds."""
        return min(self.V, MOST_WIDTH, 2 * SCRATCH // (self.K * self.heads) // LANES * LANES)


def chunkwise(p: LinearAttention) -> bool:
    """Whether the matrix form pays, as measured: a token loop without decays multiplies as little as the products do.

    A strip of the state must fit scratch."""
    if p.erase != "none" or p.decay == "none" or p.T < FROM or p.K * LANES > SCRATCH:
        return False
    return p.V >= WIDE or LinearAttentionChunk(**vars(p)).heads > 1


def chunk_tile(gemm_tile: tuple[int, int]) -> tuple[int, int]:
    """`tile` for registers that hold so many accumulators of a product: wide, as both operands are in scratch."""
    tokens, groups = gemm_tile
    return (6, 4) if tokens * groups >= 24 else gemm_tile


def build(name: str, p: LinearAttentionChunk) -> Built:
    whole, rest = divmod(p.V, p.width)
    strips = whole + (1 if rest else 0)
    with kernel(name, [(a, "float32", p.size(a)) for a in p.args]) as kern:
        first, strip = let(kern.block // strips * p.heads), let(kern.block % strips)
        if not rest:
            _Block(kern, p, first, strip * p.width, p.width).run()
        else:
            with T.If(strip < whole):
                with T.Then():
                    _Block(kern, p, first, strip * p.width, p.width).run()
                with T.Else():
                    _Block(kern, p, first, whole * p.width, rest).run()
    return Built(kern.func, p.H // p.heads * strips)


class _Block:
    """`heads` heads from `first` on, `width` value channels from v0 on of each."""

    def __init__(self, kern: Kernel, p: LinearAttentionChunk, first: Expr, v0: Expr, width: int) -> None:
        self.kern, self.p, self.first, self.v0, self.width = kern, p, first, let(v0), width
        self.per_key = p.decay == "key"
        self.padded = -(-p.n // LANES) * LANES
        self.S = local(p.heads * p.K * width)
        self.keys, self.values = local(self.padded * p.K), local(p.n * width)
        self.queries = local(p.n * p.K if self.per_key else 1)
        self.raw, self.A = local(p.n * self.padded), local(p.n * self.padded)
        self.W = local(p.K if self.per_key else self.padded)  # of a key: the decay since the sub-chunk began
        self.since = local(p.n)  # e, a number per token
        self.sums, self.acc = local(LANES * LANES), local(p.tile[0] * p.tile[1] * LANES)

    def run(self) -> None:
        p = self.p
        self._each_row(lambda past, at, lanes: store(self.S, at, load(self.kern["past"], past, lanes), lanes))
        whole, rest = divmod(p.T, p.n)
        loop(whole, lambda i: self._tokens(i * p.n, p.n))
        if rest:
            self._tokens(whole * p.n, rest)
        self._each_row(lambda past, at, lanes: store(self.kern["past"], past, load(self.S, at, lanes), lanes))

    def _each_row(self, move: Callable[[Expr, Expr, int], None]) -> None:
        """move(where in the state, where in scratch, lanes) for all of the block's state."""
        p = self.p

        def row(r: Expr) -> None:
            for c, lanes in pieces(self.width):
                move((self.first * p.K + r) * p.V + self.v0 + c, r * self.width + c, lanes)

        loop(p.heads * p.K, row)

    def _tokens(self, t0: Expr, n: int) -> None:
        """One sub-chunk."""
        p = self.p
        self._take_keys(t0, n)
        for g in range(p.group):
            if not self.per_key:
                self._scores(t0, n, g)

            def head(h: Expr, g: int = g) -> None:
                if g == 0:
                    self._take_values(t0, n, h)
                if self.per_key:
                    self._decayed_scores(t0, n, g)
                else:
                    self._weigh(t0, n, h)
                self._outputs(t0, n, h, g)
                if g == p.group - 1:
                    self._update(n, h)

            loop(p.heads, head)

    def _query(self, t: Expr, g: int) -> Expr:
        p = self.p
        head = self.first * p.group + g if p.Hq >= p.H else self.first // (p.H // p.Hq)
        return t * p.ldq + head * p.K

    def _take_keys(self, t0: Expr, n: int) -> None:
        """Keys side by side; zeros behind the last token up to a whole vector of them."""
        p = self.p
        column = let(self.first // (p.H // p.Hk) * p.K)

        def token(j: Expr) -> None:
            for c, lanes in pieces(p.K):
                store(self.keys, j * p.K + c, load(self.kern["k"], (t0 + j) * p.ldk + column + c, lanes), lanes)

        loop(n, token)
        for c, lanes in pieces((self.padded - n) * p.K):
            store(self.keys, n * p.K + c, splat(0.0, lanes), lanes)

    def _take_values(self, t0: Expr, n: int, h: Expr) -> None:
        p = self.p

        def token(j: Expr) -> None:
            start = let((t0 + j) * p.ldv + (self.first + h) * p.V + self.v0)
            for c, lanes in pieces(self.width):
                store(self.values, j * self.width + c, load(self.kern["v"], start + c, lanes), lanes)

        loop(n, token)

    def _clear_sums(self) -> None:
        for j in range(LANES):
            store(self.sums, j * LANES, splat(0.0))

    def _over_keys(self, body: Callable[[Expr, int], None]) -> None:
        """body(channel, lanes) for all key channels."""
        whole, rest = divmod(self.p.K, LANES)
        loop(whole, lambda c: body(c * LANES, LANES))
        if rest:
            body(whole * LANES, rest)

    def _scores(self, t0: Expr, n: int, g: int) -> None:
        """raw[i, j] = q_i . k_j, sixteen j at a time up to i."""

        def token(i: Expr) -> None:
            query = let(self._query(t0 + i, g))
            with T.serial(i // LANES + 1) as j0:
                self._clear_sums()

                def channels(c: Expr, lanes: int) -> None:
                    q = let(load(self.kern["q"], query + c, lanes))
                    for j in range(LANES):
                        k = load(self.keys, (j0 * LANES + j) * self.p.K + c, lanes)
                        store(self.sums, j * LANES, load(self.sums, j * LANES, lanes) + q * k, lanes)

                self._over_keys(channels)
                store(self.raw, i * self.padded + j0 * LANES, sums_of_sixteen(self.sums))

        with T.serial(n) as i:
            token(i)

    def _weigh(self, t0: Expr, n: int, h: Expr) -> None:
        """A = raw o W row by row, zeros behind the diagonal; W is left as the last token's, e in `since`."""
        lane = T.ramp(T.int32(0), 1, LANES)
        for j in range(0, self.padded, LANES):
            store(self.W, j, splat(0.0))
        since = local(1)
        T.buffer_store(since, T.float32(1.0), [0])
        with T.serial(n) as i:
            keep = let(self._keep(t0 + i, self.first + h))
            T.buffer_store(since, since[0] * keep, [0])
            T.buffer_store(self.since, since[0], [i])
            for j in range(0, self.padded, LANES):
                tokens = lane + T.broadcast(T.int32(j), LANES)
                now = T.broadcast(i, LANES)
                w = let(tirx.Select(tokens.equal(now), splat(1.0), load(self.W, j) * splat(keep)))
                store(self.W, j, w)
                at = i * self.padded + j
                store(self.A, at, tirx.Select(tokens <= now, load(self.raw, at) * w, splat(0.0)))

    def _keep(self, t: Expr, head: Expr) -> Expr:
        """The decay of one token, a number."""
        p = self.p
        if p.decay == "none":
            return T.float32(1.0)
        return T.exp(self.kern["decay"][head if p.decay == "constant" else t * p.ldg + head])

    def _decayed_scores(self, t0: Expr, n: int, g: int) -> None:
        """A, with keys and queries decayed channel by channel; later queries of a head find its keys decayed."""
        p = self.p
        if g:
            self._take_keys(t0, n)
        self._over_keys(lambda c, lanes: store(self.W, c, splat(1.0, lanes), lanes))
        for i in range(n):
            query, decay = let(self._query(t0 + i, g)), let((t0 + i) * p.ldg + self.first * p.K)
            self._clear_sums()

            def channels(c: Expr, lanes: int, i: int = i, query: Expr = query, decay: Expr = decay) -> None:
                keep = let(T.exp(load(self.kern["decay"], decay + c, lanes)))
                q = let(load(self.kern["q"], query + c, lanes))
                since = let(load(self.W, c, lanes) * keep)
                store(self.W, c, since, lanes)
                store(self.queries, i * p.K + c, q * since, lanes)
                for j in range(i + 1):
                    k = load(self.keys, j * p.K + c, lanes)
                    if j < i:
                        k = let(k * keep)
                        store(self.keys, j * p.K + c, k, lanes)
                    store(self.sums, j * LANES, load(self.sums, j * LANES, lanes) + q * k, lanes)

            self._over_keys(channels)
            store(self.A, i * self.padded, sums_of_sixteen(self.sums))

    def _tiles(self, rows: int, body: Callable[[Expr, int, Expr, Parts], None]) -> None:
        """body(first row, rows, first column, its vectors) over rows x width, columns outside."""
        vectors = self.p.tile[1] * LANES
        step = -(-rows // -(-rows // self.p.tile[0]))

        def columns(c0: Expr, parts: Parts) -> None:
            loop(rows // step, lambda r: body(r * step, step, c0, parts))
            if rows % step:
                body(rows // step * step, rows % step, c0, parts)

        loop(self.width // vectors, lambda c: columns(c * vectors, pieces(vectors)))
        if self.width % vectors:
            columns(self.width // vectors * vectors, pieces(self.width % vectors))

    def _at(self, r: int, g: int) -> int:
        return (r * self.p.tile[1] + g) * LANES

    def _multiply(
        self, extent: Expr, rows: int, parts: Parts, x: Callable[[Expr, int], Expr], y: tuple[Buffer, Expr]
    ) -> None:
        """acc[r] += sum_i x(i, r) y[i], y in rows of `width`."""
        with T.serial(extent) as i:
            columns = [let(load(y[0], y[1] + i * self.width + c, lanes)) for c, lanes in parts]
            for r in range(rows):
                factor = let(x(i, r))
                for g, (_, lanes) in enumerate(parts):
                    at = self._at(r, g)
                    store(self.acc, at, load(self.acc, at, lanes) + columns[g] * splat(factor, lanes), lanes)

    def _outputs(self, t0: Expr, n: int, h: Expr, g: int) -> None:
        """o = scale (A V + (e o Q) S), each row over the tokens up to its tile's last."""
        p = self.p

        def query(c: Expr, r: Expr) -> Expr:
            return self.queries[r * p.K + c] if self.per_key else self.kern["q"][self._query(t0 + r, g) + c]

        def tile(r0: Expr, rows: int, c0: Expr, parts: Parts) -> None:
            index = [(r, v, c, lanes) for r in range(rows) for v, (c, lanes) in enumerate(parts)]
            for r, v, _, lanes in index:
                store(self.acc, self._at(r, v), splat(0.0, lanes), lanes)
            self._multiply(p.K, rows, parts, lambda c, r: query(c, r0 + r), (self.S, h * (p.K * self.width) + c0))
            if not self.per_key and p.decay != "none":
                for r, v, _, lanes in index:
                    at = self._at(r, v)
                    store(self.acc, at, load(self.acc, at, lanes) * splat(self.since[r0 + r], lanes), lanes)
            self._multiply(r0 + rows, rows, parts, lambda j, r: self.A[(r0 + r) * self.padded + j], (self.values, c0))
            for r, v, c, lanes in index:
                at = ((t0 + r0 + r) * p.H * p.group + (self.first + h) * p.group + g) * p.V + self.v0 + c0 + c
                store(self.kern["o"], at, load(self.acc, self._at(r, v), lanes) * splat(p.scale, lanes), lanes)

        self._tiles(n, tile)

    def _update(self, n: int, h: Expr) -> None:
        """S <- e_n S + K^T (W o V); where keys are decayed already, V as it is."""
        p = self.p
        if not self.per_key and p.decay != "none":

            def decay(j: Expr) -> None:
                for c, lanes in pieces(self.width):
                    at = j * self.width + c
                    store(self.values, at, load(self.values, at, lanes) * splat(self.W[j], lanes), lanes)

            loop(n, decay)

        def tile(r0: Expr, rows: int, c0: Expr, parts: Parts) -> None:
            def state(r: int, c: int) -> Expr:
                return (h * p.K + r0 + r) * self.width + c0 + c

            index = [(r, v, c, lanes) for r in range(rows) for v, (c, lanes) in enumerate(parts)]
            for r, v, c, lanes in index:
                keep = self.W[r0 + r] if self.per_key else self.since[n - 1]
                store(self.acc, self._at(r, v), load(self.S, state(r, c), lanes) * splat(keep, lanes), lanes)
            self._multiply(n, rows, parts, lambda j, r: self.keys[j * p.K + r0 + r], (self.values, c0))
            for r, v, c, lanes in index:
                store(self.S, state(r, c), load(self.acc, self._at(r, v), lanes), lanes)

        self._tiles(p.K, tile)
