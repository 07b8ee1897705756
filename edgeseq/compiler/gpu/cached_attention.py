"""Causal attention over a KV cache, with the append (see kernels/cached_attention): online softmax over tiles of keys.

A block has up to 4 queries that share a KV head. It reads the cache as it was before this launch and what is new from
the inputs, so that blocks need not wait for one another; who has the last query of a head appends. Where a chunk
overwrites rows that its first tokens still see (a ring, a reservoir), one block has the head and goes token by token.

8 threads share a key of the first product, all have a few columns of the second one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgeseq.ops.sparse_attention import FACTORS, MODULUS, SHIFTS

from ..kernels.cached_attention import NEVER, CachedAttention, sizes_of
from ..tvm_api import T, tirx
from . import Built
from ._emit import (
    Buffer,
    Expr,
    Kernel,
    blocks_of,
    f32,
    kernel,
    let,
    local,
    loop,
    power_of_two,
    shared,
    store,
    strided,
    sync,
    sync_memory,
    when,
    zero,
)
from ._quantise import BLOCK, blocks, write_block

QUERIES = 4
LANES = 8  # threads of a key
USEFUL_BLOCKS = 264  # that keep a large GPU busy
LEAST_ROWS = 256  # of a part
TILE = 128
SPAN = 8  # scores that a thread compares at least
AHEAD = 8  # rows of V asked for at a time


@dataclass(frozen=True)
class FusedAttention(CachedAttention):
    """A step that rotates its queries and its key itself (see kernels/rotary), by cos, sin [d/2]."""

    interleaved: bool = False

    @property
    def args(self) -> tuple[str, ...]:
        own = super().args
        return (*own[:6], "cos", "sin", *own[6:])


def parts_of(heads: int, kv_heads: int, rows: int) -> int:
    """Ranges into which the cache of a step is cut."""
    blocks = kv_heads * blocks_of(heads // kv_heads, QUERIES)
    return max(1, min(blocks_of(USEFUL_BLOCKS, blocks), rows // LEAST_ROWS))


def build(name: str, p: CachedAttention, gpu: Any) -> Built:
    group = p.H // p.Hk
    in_order = p.ring and (p.T > 1 or p.blocks > 0)
    alone = p.T == 1 and p.parts == 1
    queries = 1 if alone else min(QUERIES, group if in_order else group * p.T)
    threads = min(gpu.threads, 1024 if alone else 256)
    tiles = blocks_of(group if in_order else group * p.T, queries)
    grid = p.Hk * (1 if in_order else tiles * p.parts)
    sizes = sizes_of(p) | dict.fromkeys(("cos", "sin"), ("float32", p.d // 2))
    with kernel(name, [(a, *sizes[a]) for a in p.args], grid, threads, gpu) as k:
        attention = _Attention(k, p, queries)
        if in_order:
            loop(p.T, lambda t: _in_order(attention, t, tiles))
        else:
            _at_once(attention, tiles)
    return Built(k.func, grid, threads)


def _at_once(a: _Attention, tiles: int) -> None:
    """All tokens at once, or one part of a step: rows of the cache that this launch does not write, then the new."""
    k, p, group = a.k, a.p, a.group
    part = k.block % p.parts if p.parts > 1 else 0
    block = k.block // p.parts if p.parts > 1 else k.block
    a.head = block // tiles if tiles > 1 else block
    first = let(block % tiles * a.queries) if tiles > 1 else 0
    place, old = _place(p, k["position"][0]), T.Cast("int32", k["position"][0])
    rows: Callable[[Expr], Expr] = lambda i: i  # noqa: E731
    if p.ring:
        old, own = T.Cast("int32", T.min(k["position"][0], T.int64(p.N - 1))), let(place)
        rows = lambda i: i + tirx.Select(i < own, 0, 1)  # noqa: E731
    numbers = [let(T.min(first + r, group * p.T - 1)) if a.queries > 1 else first for r in range(a.queries)]
    tokens = [let(n // group) if p.T > 1 else 0 for n in numbers]
    heads = [let(a.head * group + n % group) if group > 1 else a.head for n in numbers]
    a.start(tokens, heads)
    a.sweep(old, ("past_k", "past_v"), lambda i: (a.head * p.N + rows(i)) * p.d, part=part)
    newest = T.min((block % tiles + 1) * a.queries, group * p.T) - 1 if tiles > 1 else group * p.T - 1
    a.sweep(
        1 if p.T == 1 else newest // group + 1,
        ("k", "v"),
        lambda i: a.head * p.d,
        lambda r, i: i <= tokens[r] if p.T > 1 else part == 0 if p.parts > 1 else True,
        (p.ldk, p.ldv),
    )
    exists = [True if group * p.T % a.queries == 0 else first + r < group * p.T for r in range(a.queries)]
    a.finish(tokens, heads, exists, part)
    with when(k.block % (tiles * p.parts) == 0 if tiles * p.parts > 1 else True):
        loop(p.T, lambda t: a.append(t, let(place + t)))


def _place(p: CachedAttention, token: Expr) -> Expr:
    """The row of the cache that `token`, int64, goes to."""
    if not p.ring:
        return T.Cast("int32", token)
    window = p.N - p.prefix - p.block * p.blocks
    turn = p.prefix + (token - p.prefix) % window
    return T.Cast("int32", tirx.Select(token < p.prefix, token, turn) if p.prefix else token % window)


def _in_order(a: _Attention, t: Expr, tiles: int) -> None:
    """Token t: appended, then seen by its queries with all that the cache holds."""
    k, p = a.k, a.p
    a.head = k.block
    token = k["position"][0] + T.Cast("int64", t)
    place = let(_place(p, token))
    sync_memory()
    if p.blocks:
        _keep(a, let(token), place)
        sync_memory()
    a.append(t, place)
    sync_memory()

    def some(first: Expr) -> None:
        if tiles > 1:
            sync()  # what the queries before these have met in is free
        heads = [let(a.head * a.group + T.min(first + r, a.group - 1)) for r in range(a.queries)]
        a.start([t] * a.queries, heads)
        held = T.Cast("int32", T.min(token + 1, T.int64(p.N)))
        a.sweep(held, ("past_k", "past_v"), lambda i: (a.head * p.N + i) * p.d)
        a.finish([t] * a.queries, heads, [first + r < a.group for r in range(a.queries)])

    loop(tiles, lambda i: some(i * a.queries))


def _keep(a: _Attention, token: Expr, place: Expr) -> None:
    """What `token` is going to replace moves to the reservoir where its block is drawn."""
    p = a.p
    window = p.N - p.prefix - p.block * p.blocks
    left = let(token - (p.prefix + window))
    with when(left >= 0):
        j = let(left // p.block)
        z = let((T.int64(FACTORS[0]) * (j + 1) + FACTORS[1] * (p.seed + 1)) % MODULUS)
        for shift in SHIFTS:
            z = let((z * z + shift) % MODULUS)
        drawn = let(tirx.Select(j < p.blocks, j, z % (j + 1)))
        with when(drawn < p.blocks):
            kept = let(T.Cast("int32", p.prefix + window + drawn * p.block + left % p.block))
            for name in ("past_k", "past_v"):
                a.move(a.k[name], a.head * p.N + kept, a.k[name], (a.head * p.N + place) * p.d)


class _Attention:
    """Registers and shared memory of a block for `queries` queries."""

    def __init__(self, k: Kernel, p: CachedAttention, queries: int) -> None:
        self.k, self.p, self.queries, self.group = k, p, queries, p.H // p.Hk
        self.head: Expr = 0
        self.lanes = LANES if p.d >= LANES else 1
        self.each = blocks_of(p.d, self.lanes)
        self.keys = k.threads // self.lanes  # at once
        self.tile = max(self.keys, min(TILE, k.threads))
        self.width = min(k.threads, power_of_two(p.d))  # threads that cover a row of V
        self.columns = blocks_of(p.d, self.width)  # of a thread
        self.sharers = k.threads // self.width  # threads that have the same column
        self.q, self.acc = local(queries * self.each), local(queries * self.columns)
        self.top, self.total = local(queries), local(queries)
        self.scores, self.weights = shared(queries * self.tile), shared(queries * self.tile)
        self.meet = shared(queries * k.threads)
        self.lane = k.thread % self.lanes if self.lanes > 1 else 0
        self.column = k.thread % self.width if self.sharers > 1 else k.thread
        self.sharer = k.thread // self.width if self.sharers > 1 else 0

    def _elements(self) -> list[tuple[int, Expr, Expr | bool]]:
        """(register, element of the head, whether there is one) of this thread's part of a key."""
        whole = self.p.d // self.lanes
        found = [(e, e * self.lanes + self.lane) for e in range(self.each)]
        return [(e, i, True if e < whole else self.lane < self.p.d % self.lanes) for e, i in found]

    def start(self, tokens: list[Expr], heads: list[Expr]) -> None:
        for r, (t, h) in enumerate(zip(tokens, heads, strict=True)):
            for e, i, inside in self._elements():
                at = r * self.each + e
                store(self.q, at, f32(0.0))
                with when(inside):
                    store(self.q, at, self._new("query", t * self.p.ldq + h * self.p.d, i) * f32(self.p.scale))
        zero(self.acc, self.queries * self.columns)
        zero(self.top, self.queries, NEVER)
        zero(self.total, self.queries)

    def sweep(
        self,
        count: Expr,
        names: tuple[str, str],
        start: Callable[[Expr], Expr],
        visible: Callable[[int, Expr], Expr | bool] = lambda r, i: True,
        ld: tuple[int, int] | None = None,
        part: Expr = 0,
    ) -> None:
        """Keys 0 .. count - 1 of two buffers; the row of key i begins at start(i), plus i * ld where there is one.

        Part of p.parts: tiles part, part + parts, ... only. Bounds of loops around barriers are no registers, so that
        every compiler sees that the threads of a block agree on them.
        """

        def at(which: int, i: Expr) -> Expr:
            return start(i) + (i * ld[which] if ld else 0)

        def tile(first: Expr) -> None:
            left = count - first
            loop(self.tile // self.keys, lambda n: self._score(names[0], at, visible, first, left, n * self.keys))
            for r, shrink in enumerate(self._soften()):
                store(self.total, r, self.total[r] * shrink)
                for c in range(self.columns):
                    store(self.acc, r * self.columns + c, self.acc[r * self.columns + c] * shrink)
            self._mix(names[1], at, first, left)

        if isinstance(count, int):
            tile(0)
            return
        parts = self.p.parts
        with T.serial(tirx.floordiv(count + (self.tile - 1 + (parts - 1 - part) * self.tile), self.tile * parts)) as n:
            tile((n * parts + part) * self.tile)

    def _score(self, name: str, at: Any, visible: Any, first: Expr, left: Expr, n: Expr) -> None:
        """Scores of the keys that the block takes at once, from number n of the tile on."""
        k = self.k
        own = let(T.min(n + (k.thread // self.lanes if self.lanes > 1 else k.thread), left - 1))
        base = let(at(0, first + own))
        row = local(self.each)
        for e, i, inside in self._elements():
            if inside is not True:
                store(row, e, f32(0.0))
            with when(inside):
                store(row, e, self._new(name, base, i))
        for r in range(self.queries):
            dot = self.q[r * self.each] * row[0]
            for e in range(1, self.each):
                dot = dot + self.q[r * self.each + e] * row[e]
            store(self.meet, r * k.threads + k.thread, dot)
        sync()

        def gather(pair: Expr, r: int) -> None:
            """Score of a query and a key: what its threads have found."""
            score, start = self.meet[pair * self.lanes], pair * self.lanes
            for e in range(1, self.lanes):
                score = score + self.meet[start + e]
            number = n + (pair if self.queries == 1 else pair % self.keys)
            seen = number < left
            if (condition := visible(r, first + number)) is not True:
                seen = T.And(seen, condition)
            store(self.scores, r * self.tile + number, tirx.Select(seen, score, f32(NEVER)))

        if self.lanes == 1:
            for r in range(self.queries):
                gather(r * self.keys + k.thread, r)
        else:
            for r in range(self.queries):  # each query has some threads of its own
                mine = k.thread - r * self.keys
                with when(T.And(mine >= 0, mine < self.keys)):
                    gather(k.thread, r)
        sync()

    def _soften(self) -> list[Expr]:
        """Scores to weights relative to the largest so far; by how much what was summed before shrinks."""
        k, tile = self.k, self.tile
        spans = max(1, k.threads // (self.queries * SPAN))  # that have threads to look for their largest score
        spans = min(spans, tile // SPAN)
        width = tile // spans
        with when(True if self.queries * spans == k.threads else k.thread < self.queries * spans):
            best = local(1)
            store(best, 0, self.scores[k.thread * width])
            with T.serial(width) as i:
                store(best, 0, T.max(best[0], self.scores[k.thread * width + i]))
            store(self.meet, k.thread, best[0])
        sync()
        shrinks = []
        for r in range(self.queries):
            top = local(1)
            store(top, 0, self.top[r])
            for i in range(spans):
                store(top, 0, T.max(top[0], self.meet[r * spans + i]))
            shrinks.append(let(T.exp(self.top[r] - top[0])))
            store(self.top, r, top[0])
            with when(True if tile == k.threads else k.thread < tile):
                score = let(self.scores[r * tile + k.thread])
                weight = tirx.Select(score > f32(NEVER), T.exp(score - top[0]), f32(0.0))
                store(self.weights, r * tile + k.thread, weight)
        sync()
        return shrinks

    def _mix(self, name: str, at: Any, first: Expr, left: Expr) -> None:
        """acc += weights V over the tile; rows behind the end are the last one, with the weight 0."""
        steps = self.tile // self.sharers
        batch = min(AHEAD, steps)
        some = batch * self.sharers
        with T.serial(tirx.floordiv(T.min(left, self.tile) + (some - 1), some)) as n:
            for u in range(batch):
                for r in range(self.queries):
                    weight = self.weights[r * self.tile + n * some + u * self.sharers + self.sharer]
                    store(self.total, r, self.total[r] + weight)
            for c in range(self.columns):
                with when(True if (c + 1) * self.width <= self.p.d else c * self.width + self.column < self.p.d):
                    rows = local(batch)
                    for u in range(batch):
                        key = first + T.min(n * some + u * self.sharers + self.sharer, left - 1)
                        store(rows, u, self.k[name][at(1, key) + c * self.width + self.column])
                    for u in range(batch):
                        own = n * some + u * self.sharers + self.sharer
                        for r in range(self.queries):
                            to = r * self.columns + c
                            store(self.acc, to, self.acc[to] + self.weights[r * self.tile + own] * rows[u])

    def finish(self, tokens: list[Expr], heads: list[Expr], exists: list[Expr | bool], part: Expr = 0) -> None:
        """Results, or what a part leaves: accumulator, maximum, sum."""
        k, p = self.k, self.p
        totals = self._across(self.total, 1, 0)
        for c in range(self.columns):
            column = c * self.width + self.column
            sums = self._across(self.acc, self.columns, c)
            for r, (t, h) in enumerate(zip(tokens, heads, strict=True)):
                if p.quant is not None:
                    inside = T.And(self.sharer == 0, column < p.d)
                    inside = inside if exists[r] is True else T.And(inside, exists[r])
                    at = t * blocks(p.H * p.d) + (h * p.d + column) // BLOCK
                    write_block(k, at, sums[r] / totals[r], p.quant, self.meet, inside)
                    continue
                start = t * (p.H * p.d) + h * p.d if p.parts == 1 else (h * p.parts + part) * (p.d + 2)
                with when(exists[r]), when(T.And(self.sharer == 0, column < p.d)):
                    store(k["o"], start + column, sums[r] / totals[r] if p.parts == 1 else sums[r])
        if p.parts > 1:
            for r, h in enumerate(heads):
                with when(k.thread == 0):
                    store(k["o"], (h * p.parts + part) * (p.d + 2) + p.d, self.top[r])
                    store(k["o"], (h * p.parts + part) * (p.d + 2) + p.d + 1, totals[r])

    def _across(self, registers: Buffer, stride: int, offset: int) -> list[Expr]:
        """For each query the sum of a register over the threads that share a column."""
        k = self.k
        sync()
        for r in range(self.queries):
            store(self.meet, r * k.threads + k.thread, registers[r * stride + offset])
        sync()
        found = []
        for r in range(self.queries):
            whole = local(1)
            store(whole, 0, f32(0.0))
            with T.serial(self.sharers) as s:
                store(whole, 0, whole[0] + self.meet[r * k.threads + s * self.width + self.column])
            found.append(whole[0])
        return found

    def append(self, t: Expr, row: Expr) -> None:
        """Key and value of token t to a row of the cache."""
        k, p = self.k, self.p
        for new, ld, cache in (("k", p.ldk, "past_k"), ("v", p.ldv, "past_v")):
            to, start = (self.head * p.N + row) * p.d, t * ld + self.head * p.d
            strided(k, p.d, partial(self._place, k[cache], to, new, start))

    def _place(self, to: Buffer, at: Expr, name: str, start: Expr, i: Expr) -> None:
        store(to, at + i, self._new(name, start, i))

    def _new(self, name: str, start: Expr, i: Expr) -> Expr:
        """Element i of the head that begins at `start`: of a query or new key rotated, where that is left to this
        kernel; of all else what it is."""
        x, p = self.k[name], self.p
        if not isinstance(p, FusedAttention) or name not in ("query", "k"):
            return x[start + i]
        i, half = T.int32(i) if isinstance(i, int) else let(i), p.d // 2
        first = i % 2 < 1 if p.interleaved else i < half
        apart, pair = (1, i // 2) if p.interleaved else (half, i % half)
        other = x[start + tirx.Select(first, i + apart, i - apart)]
        sine = self.k["sin"][pair]
        return x[start + i] * self.k["cos"][pair] + other * tirx.Select(first, f32(0.0) - sine, sine)

    def move(self, to: Buffer, row: Expr, source: Buffer, start: Expr) -> None:
        strided(self.k, self.p.d, lambda i: store(to, row * self.p.d + i, source[start + i]))
