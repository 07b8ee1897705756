"""Causal attention of a chunk of tokens over a cache and over itself, with the append: rows of queries in blocks.

  S = scale Q K^T;  m' = max(m, rowmax S);  P = e^(S - m');  l = e^(m-m') l + rowsum P;  O = e^(m-m') O + P V
Blocked online softmax (Dao et al. 2022, algorithm 1): a block of rows is every query head of a key/value head at some
tokens; it reads the cache once, in tiles of keys that are transposed as they come, and the new rows where they lie.
Tiles behind its last token are not read. Running maximum, sum and output are float32; o = O / l.

Ring: row m of the cache holds the latest token before the chunk that belongs there, and token t of the chunk sees it
while it is younger than the window; `prefix` rows are seen by all. The new rows are written last, so that no query
misses a key that they replace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..tvm_api import T, tirx
from . import Built
from ._emit import LANES, Expr, Kernel, horizontal_sum, kernel, let, load, local, loop, pieces, splat, store
from ._lanes import SQUARE, horizontal_max, transpose
from ._tiles import accumulators, variants

if TYPE_CHECKING:
    from ..targets import Target

TILE = 64
BLOCK_ROWS = 48
FRESH = -1.0e29  # above what hides a score, so that a row which has seen nothing weighs nothing
HIDDEN = -1.0e30


@dataclass(frozen=True)
class AttentionChunk:
    """T new tokens, H query heads over Hk cached heads of width d, N cache rows; ld*: floats between tokens.

    ring: the cache is `prefix` rows that stay and a ring of the others. tile: (rows, groups of 16) of accumulators.
    """

    T: int
    H: int
    Hk: int
    d: int
    N: int
    ldq: int
    ldk: int
    ldv: int
    scale: float
    ring: bool = False
    prefix: int = 0
    tile: tuple[int, int] = (6, 1)
    args = ("q", "k", "v", "past_k", "past_v", "position", "o")

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.H // self.Hk

    @property
    def block_rows(self) -> int:
        """Rows of queries of a block: a whole number of tiles, so many that all blocks have about as many."""
        rows, step = self.T * self.group, self.tile[0]
        blocks = -(-rows // BLOCK_ROWS)
        return -(-rows // (blocks * step)) * step

    @property
    def row_blocks(self) -> int:
        return -(-self.T * self.group // self.block_rows)

    @property
    def window(self) -> int:
        return self.N - self.prefix


def candidates(p: AttentionChunk, target: Target) -> list[AttentionChunk]:
    """What tuning may choose from: tiles of both products."""
    return variants(p, min(BLOCK_ROWS, p.T * p.group), TILE // LANES, accumulators(target.features))


def build(name: str, p: AttentionChunk) -> Built:
    assert TILE // LANES % p.tile[1] == 0, "a tile of keys is a whole number of groups"
    cache = p.Hk * p.N * p.d
    params = [
        ("q", "float32", (p.T - 1) * p.ldq + p.H * p.d),
        ("k", "float32", (p.T - 1) * p.ldk + p.Hk * p.d),
        ("v", "float32", (p.T - 1) * p.ldv + p.Hk * p.d),
        ("past_k", "float32", cache),
        ("past_v", "float32", cache),
        ("position", "int64", 1),
        ("o", "float32", p.T * p.H * p.d),
    ]
    with kernel(name, params) as kern:
        if p.ring:
            work = _Block(kern, p, kern.block)
            loop(p.row_blocks, work.attend)
            work.append()
        else:
            work = _Block(kern, p, let(kern.block // p.row_blocks))
            rows = let(kern.block % p.row_blocks)
            work.attend(rows)
            with T.If(rows == 0), T.Then():
                work.append()
    return Built(kern.func, p.Hk if p.ring else p.Hk * p.row_blocks)


class _Block:
    """The code of one key/value head: its scratch memory, and what is done with a block of rows."""

    def __init__(self, kern: Kernel, p: AttentionChunk, head: Expr) -> None:
        self.kern, self.p, self.head = kern, p, head
        self.base = let(head * (p.N * p.d))
        self.width = -(-p.d // LANES) * LANES
        rows = p.block_rows
        self.q, self.keys = local(rows * p.d), local(p.d * TILE)
        self.scores, self.acc = local(rows * TILE), local(rows * self.width)
        self.m, self.total, self.alpha = local(rows), local(rows), local(rows)
        self.scratch, self.squares = local(LANES), local(2 * SQUARE)
        self.sums = local(p.tile[0] * p.tile[1] * LANES)
        self.position = let(kern["position"][0])
        known = self.position if not p.ring else tirx.Select(self.position < p.N, self.position, T.int64(p.N))
        self.held = let(T.Cast("int32", known))  # rows of the cache that hold a token
        # the newest token of a ring lies in row prefix + newest; a row `back` rows before it is `back` tokens older
        self.newest = let(T.Cast("int32", (self.position - 1 - p.prefix) % p.window))
        self.first = rows  # first row of queries of the block, once there is one

    def append(self) -> None:
        """The new rows into the cache, in order."""
        p, kern = self.p, self.kern

        def token(t: Expr) -> None:
            at = let(self.position + T.Cast("int64", t))
            row = T.Cast("int32", at)
            if p.ring:
                turn = p.prefix + (at - p.prefix) % p.window
                row = T.Cast("int32", tirx.Select(at < p.prefix, at, turn) if p.prefix else turn)
            row = let(row)
            for new, ld, cache in (("k", p.ldk, "past_k"), ("v", p.ldv, "past_v")):
                for i, lanes in pieces(p.d):
                    store(
                        kern[cache],
                        self.base + row * p.d + i,
                        load(kern[new], t * ld + self.head * p.d + i, lanes),
                        lanes,
                    )

        loop(p.T, token)

    def attend(self, block: Expr) -> None:
        p, rows = self.p, self.p.block_rows
        self.first = let(T.int32(rows) * block)
        loop(rows, self._start)
        tiles = let(tirx.ceildiv(self.held, TILE))
        last = let(T.min(self.first + rows, p.T * p.group) - 1)
        own = let(tirx.ceildiv(last // p.group + 1, TILE))
        with T.serial(tiles + own) as tile:
            old = let(tile < tiles)
            start = let(tirx.Select(old, tile, tile - tiles) * TILE)
            count = let(T.min(tirx.Select(old, self.held, p.T) - start, TILE))
            past, column = self.base + start * p.d, self.head * p.d
            _choose(
                old,
                lambda: self._load("past_k", past, p.d, count),
                lambda: self._load("k", start * p.ldk + column, p.ldk, count),
            )
            self._score()
            if p.ring:
                _choose(
                    old,
                    lambda: loop(rows, lambda r: self._soften(r, lambda j, t: self._old(j, t, start, count))),
                    lambda: loop(rows, lambda r: self._soften(r, lambda j, t: self._new(j, t, start))),
                )
            else:
                loop(rows, lambda r: self._soften(r, lambda j, t: self._before(j, t, old, start, count)))
            _choose(
                old,
                lambda: self._weigh("past_v", past, p.d, count),
                lambda: self._weigh("v", start * p.ldv + column, p.ldv, count),
            )
        loop(rows, self._finish)

    def _token(self, r: Expr) -> Expr:
        """The token of row r; rows behind the last one repeat it."""
        return T.min(self.first + r, self.p.T * self.p.group - 1) // self.p.group

    def _column(self, r: Expr) -> Expr:
        """Where the query of row r begins, apart from its token."""
        p = self.p
        return (self.head * p.group + T.min(self.first + r, p.T * p.group - 1) % p.group) * p.d

    def _start(self, r: Expr) -> None:
        p = self.p
        start = let(self._token(r) * p.ldq + self._column(r))
        for i, lanes in pieces(p.d):
            store(self.q, r * p.d + i, load(self.kern["q"], start + i, lanes) * splat(p.scale, lanes), lanes)
        for i in range(0, self.width, LANES):
            store(self.acc, r * self.width + i, splat(0.0))
        T.buffer_store(self.m, T.float32(FRESH), [r])
        T.buffer_store(self.total, T.float32(0.0), [r])

    def _load(self, source: str, start: Expr, ld: int, count: Expr) -> None:
        """keys[i, j] = source[start + j ld + i]; columns from `count` on repeat the last key."""
        p = self.p
        buffer = self.kern[source]

        def sixteen(j0: Expr) -> None:
            offsets = [let(start + T.min(j0 * LANES + j, count - 1) * ld) for j in range(LANES)]

            def square(i0: Expr) -> None:
                for j in range(LANES):
                    store(self.squares, j * LANES, load(buffer, offsets[j] + i0 * LANES))
                transpose(self.squares)
                for i in range(LANES):
                    store(self.keys, (i0 * LANES + i) * TILE + j0 * LANES, load(self.squares, i * LANES))

            loop(p.d // LANES, square)
            loop(p.d % LANES, lambda i: loop(LANES, lambda j: single(p.d // LANES * LANES + i, j0 * LANES + j)))

        def single(i: Expr, j: Expr) -> None:
            T.buffer_store(self.keys, buffer[start + T.min(j, count - 1) * ld + i], [i * TILE + j])

        with T.serial(tirx.ceildiv(count, LANES)) as j0:
            sixteen(j0)

    def _score(self) -> None:
        """scores[r, j] = sum_i q[r, i] keys[i, j], in tiles of accumulators."""
        p, (step, groups) = self.p, self.p.tile

        def some_rows(r0: Expr) -> None:
            def some_keys(j0: Expr) -> None:
                for i in range(step * groups):
                    store(self.sums, i * LANES, splat(0.0))
                with T.serial(p.d) as i:
                    keys = [let(load(self.keys, i * TILE + (j0 * groups + g) * LANES)) for g in range(groups)]
                    for r in range(step):
                        x = let(splat(self.q[(r0 * step + r) * p.d + i]))
                        for g in range(groups):
                            at = (r * groups + g) * LANES
                            store(self.sums, at, load(self.sums, at) + keys[g] * x)
                for r in range(step):
                    for g in range(groups):
                        at = (r0 * step + r) * TILE + (j0 * groups + g) * LANES
                        store(self.scores, at, load(self.sums, (r * groups + g) * LANES))

            loop(TILE // LANES // groups, some_keys)

        loop(p.block_rows // step, some_rows)

    def _soften(self, r: Expr, visible: Callable[[Expr, Expr], Expr]) -> None:
        """A row of scores to weights; its maximum and sum follow, alpha is what older ones are multiplied by."""
        best = None
        row = let(r * TILE)
        token = let(self._token(r))
        for j in range(0, TILE, LANES):
            s = tirx.Select(visible(T.ramp(T.int32(j), 1, LANES), token), load(self.scores, row + j), splat(HIDDEN))
            store(self.scores, row + j, s)
            best = load(self.scores, row + j) if best is None else T.max(best, load(self.scores, row + j))
        new = let(T.max(self.m[r], horizontal_max(self.scratch, best)))
        T.buffer_store(self.alpha, T.exp(self.m[r] - new), [r])
        T.buffer_store(self.m, new, [r])
        whole = None
        for j in range(0, TILE, LANES):
            store(self.scores, row + j, T.exp(load(self.scores, row + j) - splat(new)))
            whole = load(self.scores, row + j) if whole is None else whole + load(self.scores, row + j)
        T.buffer_store(self.total, self.total[r] * self.alpha[r] + horizontal_sum(self.scratch, whole), [r])

    def _before(self, j: Expr, token: Expr, old: Expr, start: Expr, count: Expr) -> Expr:
        """Whether keys j of a tile are seen by a token of the chunk: the whole cache, and what the chunk has before."""
        return j < T.broadcast(tirx.Select(old, count, T.min(token - start + 1, count)), LANES)

    def _old(self, j: Expr, token: Expr, start: Expr, count: Expr) -> Expr:
        """Whether keys j of the tile at row `start` of the cache are seen by a token of the chunk."""
        p = self.p
        held = j < T.broadcast(count, LANES)
        behind = T.broadcast(self.newest - start + p.prefix, LANES) - j
        back = tirx.Select(
            behind < T.broadcast(T.int32(0), LANES), behind + T.broadcast(T.int32(p.window), LANES), behind
        )
        young = back < T.broadcast(p.window - 1 - token, LANES)
        if p.prefix:
            young = tirx.Or(young, j < T.broadcast(p.prefix - start, LANES))
        return tirx.And(held, young)

    def _new(self, j: Expr, token: Expr, start: Expr) -> Expr:
        """Whether keys j of the tile at token `start` of the chunk are seen by another token of it."""
        p = self.p
        past = j <= T.broadcast(token - start, LANES)
        if p.T <= p.window:
            return past
        young = j > T.broadcast(token - start - p.window, LANES)
        if p.prefix:
            before = let(T.Cast("int32", T.max(p.prefix - self.position, T.int64(0))))  # prefix tokens in the chunk
            young = tirx.Or(young, j < T.broadcast(before - start, LANES))
        return tirx.And(past, young)

    def _weigh(self, source: str, start: Expr, ld: int, count: Expr) -> None:
        """acc[r, i] = alpha[r] acc[r, i] + sum_j scores[r, j] source[start + j ld + i], in tiles of accumulators."""
        p, (step, groups) = self.p, self.p.tile
        whole = p.d // (groups * LANES)

        def some_rows(r0: Expr) -> None:
            loop(whole, lambda i0: some_columns(r0, i0 * (groups * LANES), pieces(groups * LANES)))
            if p.d % (groups * LANES):
                some_columns(r0, whole * groups * LANES, pieces(p.d % (groups * LANES)))

        def some_columns(r0: Expr, i0: Expr, parts: list[tuple[int, int]]) -> None:
            for r in range(step):
                for g, (i, lanes) in enumerate(parts):
                    older = load(self.acc, (r0 * step + r) * self.width + i0 + i, lanes)
                    store(self.sums, (r * groups + g) * LANES, older * splat(self.alpha[r0 * step + r], lanes), lanes)
            with T.serial(count) as j:
                values = [let(load(self.kern[source], start + j * ld + i0 + i, lanes)) for i, lanes in parts]
                for r in range(step):
                    weight = self.scores[(r0 * step + r) * TILE + j]
                    for g, (_, lanes) in enumerate(parts):
                        at = (r * groups + g) * LANES
                        store(self.sums, at, load(self.sums, at, lanes) + values[g] * splat(weight, lanes), lanes)
            for r in range(step):
                for g, (i, lanes) in enumerate(parts):
                    newer = load(self.sums, (r * groups + g) * LANES, lanes)
                    store(self.acc, (r0 * step + r) * self.width + i0 + i, newer, lanes)

        loop(p.block_rows // step, some_rows)

    def _finish(self, r: Expr) -> None:
        p = self.p
        with T.If(self.first + r < p.T * p.group), T.Then():
            inverse = let(T.float32(1.0) / self.total[r])
            start = let(self._token(r) * (p.H * p.d) + self._column(r))
            for i, lanes in pieces(p.d):
                value = load(self.acc, r * self.width + i, lanes) * splat(inverse, lanes)
                store(self.kern["o"], start + i, value, lanes)


def _choose(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()
