"""Causal attention over a KV cache, with the append: one block = one KV head, its T new rows and its query heads.

cache[hk, position + t] <- k[t], v[t];  o[t,h] = softmax_j(scale q[t,h] . K[j]) V,  j <= position + t.
Blocked online softmax (Dao et al. 2022, algorithm 1): running maximum m, sum l and accumulator in float32, one pass
over the cache. Rows above position + t are never read.

Parts: a step over a long cache is cut into ranges of rows, one block each, which leave m, l and the accumulator for
`attention_merge`. The block whose range holds the new row writes it.

Ring: token p lies in row p mod N and sees the last N tokens, itself counted. It is written just before it attends, in
place of a token that neither it nor a later one sees, so rows 0 .. min(p, N-1) are always exactly its window.
With a prefix and a reservoir (ops/sparse_attention.py) the same rows hold what it sees, and the token that is replaced
goes to the reservoir where its block is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeseq.ops.sparse_attention import FACTORS, MODULUS, SHIFTS

from ..tvm_api import T, tirx
from . import Built
from ._emit import LANES, Expr, Kernel, fill, horizontal_sum, kernel, let, load, local, loop, pieces, splat, store
from ._lanes import horizontal_max, sums_of_sixteen
from ._quantise import BLOCK, OUTPUTS, blocks, output_params, write_block

TILE = 64
NEVER = -1.0e30
USEFUL_BLOCKS = 8  # that keep the cores of a small device busy to the end
LEAST_ROWS = 512  # of a part: below it a launch more costs what a second thread saves
REGISTERS = 4  # vectors of a row of values that are summed at once


@dataclass(frozen=True)
class CachedAttention:
    """T new tokens, H query heads over Hk cached heads of width d, N cache rows; ld*: floats between tokens.

    ring: the cache holds the last tokens and no longer grows: `prefix` first ones stay, behind the ring are `blocks`
    blocks of `block` tokens drawn by `seed`; without either it holds the last N.
    parts: ranges of rows that blocks share (T = 1, no reservoir); then the last argument is [H, parts, d + 2]:
    accumulator, m, l. quant: write int8 blocks for weights of this zero point instead of o (see `quantises`).
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
    block: int = 1
    blocks: int = 0
    seed: int = 0
    parts: int = 1
    quant: int | None = None

    @property
    def args(self) -> tuple[str, ...]:
        return ("query", "k", "v", "past_k", "past_v", "position", *(("o",) if self.quant is None else OUTPUTS))

    @property
    def quantises(self) -> bool:
        """Whether it could write int8 blocks: they are whole within a head."""
        return self.parts == 1 and self.d % BLOCK == 0


def parts_of(kv_heads: int, rows: int) -> int:
    """Ranges into which a cache of `rows` rows is cut."""
    return max(1, min(-(-USEFUL_BLOCKS // kv_heads), rows // LEAST_ROWS))


def build(name: str, p: CachedAttention) -> Built:
    assert p.parts == 1 or (p.T == 1 and not p.blocks), "only a step without a reservoir is cut into parts"
    with kernel(name, [(a, *sizes_of(p)[a]) for a in p.args]) as kern:
        loop(p.T, _Head(kern, p).query)
    return Built(kern.func, p.Hk * p.parts)


def sizes_of(p: CachedAttention) -> dict[str, tuple[str, int]]:
    """dtype and elements of every argument by its name."""
    cache = p.Hk * p.N * p.d
    return {
        "query": ("float32", (p.T - 1) * p.ldq + p.H * p.d),
        "k": ("float32", (p.T - 1) * p.ldk + p.Hk * p.d),
        "v": ("float32", (p.T - 1) * p.ldv + p.Hk * p.d),
        "past_k": ("float32", cache),
        "past_v": ("float32", cache),
        "position": ("int64", 1),
        "o": ("float32", p.T * p.H * p.d if p.parts == 1 else p.H * p.parts * (p.d + 2)),
    } | output_params(p.T, p.H * p.d)


class _Head:
    """The code of one key/value head, or of one part of its rows."""

    def __init__(self, kern: Kernel, p: CachedAttention) -> None:
        self.kern, self.p = kern, p
        self.index = kern.block if p.parts == 1 else let(kern.block // p.parts)
        self.part = T.int32(0) if p.parts == 1 else let(kern.block % p.parts)
        self.base = let(self.index * (p.N * p.d))
        self.group, self.width = p.H // p.Hk, -(-p.d // LANES) * LANES
        self.scratch, self.partial = local(LANES), local(LANES * LANES)
        self.scores, self.acc = local(TILE), local(self.group * self.width)
        self.registers = local(REGISTERS * LANES)
        self.m, self.total = local(self.group), local(self.group)

    def query(self, t: Expr) -> None:
        p = self.p
        fill(self.acc, self.group * self.width)
        fill(self.m, self.group, NEVER)
        fill(self.total, self.group)
        token = let(self.kern["position"][0] + T.Cast("int64", t))
        row = _ring_row(self.kern, p, self.base, token) if p.ring else let(T.Cast("int32", token))
        rows = let(T.Cast("int32", tirx.Select(token < p.N, token + 1, T.int64(p.N)) if p.ring else token + 1))
        all_tiles = let(tirx.ceildiv(rows, TILE))
        each = let(tirx.ceildiv(all_tiles, p.parts))
        first = let(self.part * each)
        tiles = let(T.max(T.min(all_tiles - first, each), 0))
        if p.parts == 1:
            self._append(t, row)
        else:
            with T.If(tirx.And(row >= first * TILE, row < (first + tiles) * TILE)), T.Then():
                self._append(t, row)
        with T.serial(tiles) as tile:
            start = let((first + tile) * TILE)
            count = let(tirx.Select(rows - start < TILE, rows - start, TILE))
            loop(self.group, lambda g: self._tile(t, g, start, count))
        loop(self.group, lambda g: self._finish(t, g))

    def _append(self, t: Expr, row: Expr) -> None:
        p = self.p
        for new, ld, cache in (("k", p.ldk, "past_k"), ("v", p.ldv, "past_v")):
            for i, lanes in pieces(p.d):
                value = load(self.kern[new], t * ld + self.index * p.d + i, lanes)
                store(self.kern[cache], self.base + row * p.d + i, value, lanes)

    def _tile(self, t: Expr, g: Expr, first: Expr, count: Expr) -> None:
        p, scores = self.p, self.scores
        q0 = let(t * p.ldq + (self.index * self.group + g) * p.d)
        self._score(q0, first, count)
        best = load(scores, 0)
        for i in range(LANES, TILE, LANES):
            best = T.max(best, load(scores, i))
        new_m = let(T.max(self.m[g], horizontal_max(self.scratch, best)))
        alpha = let(T.exp(self.m[g] - new_m))
        T.buffer_store(self.m, new_m, [g])
        for i in range(0, TILE, LANES):
            store(scores, i, T.exp(load(scores, i) - splat(new_m)))
        whole = load(scores, 0)
        for i in range(LANES, TILE, LANES):
            whole = whole + load(scores, i)
        T.buffer_store(self.total, self.total[g] * alpha + horizontal_sum(self.scratch, whole), [g])
        self._weigh(g, alpha, first, count)

    def _score(self, q0: Expr, first: Expr, count: Expr) -> None:
        """scores[j] = scale q . K[first + j] for j < count, far below all others from there on."""
        p = self.p
        fill(self.scores, TILE, NEVER)

        def sixteen(j0: Expr) -> None:
            for j in range(LANES):  # rows behind the last one repeat it: nothing beyond is read
                k0 = let(self.base + (first + T.min(j0 * LANES + j, count - 1)) * p.d)
                store(self.partial, j * LANES, splat(0.0))
                for i, lanes in pieces(p.d):
                    product = load(self.kern["query"], q0 + i, lanes) * load(self.kern["past_k"], k0 + i, lanes)
                    store(self.partial, j * LANES, load(self.partial, j * LANES, lanes) + product, lanes)
            sums = sums_of_sixteen(self.partial) * splat(p.scale)
            behind = T.ramp(j0 * LANES, 1, LANES) < T.broadcast(count, LANES)
            store(self.scores, j0 * LANES, tirx.Select(behind, sums, splat(NEVER)))

        with T.serial(tirx.ceildiv(count, LANES)) as j0:
            sixteen(j0)

    def _weigh(self, g: Expr, alpha: Expr, first: Expr, count: Expr) -> None:
        """acc = alpha acc + sum_j scores[j] V[first + j], some vectors of the row at a time."""
        p, parts = self.p, pieces(self.p.d)
        for some in (parts[n : n + REGISTERS] for n in range(0, len(parts), REGISTERS)):
            for n, (i, lanes) in enumerate(some):
                older = load(self.acc, g * self.width + i, lanes) * splat(alpha, lanes)
                store(self.registers, n * LANES, older, lanes)
            with T.serial(count) as j:
                v0 = let(self.base + (first + j) * p.d)
                for n, (i, lanes) in enumerate(some):
                    weighted = splat(self.scores[j], lanes) * load(self.kern["past_v"], v0 + i, lanes)
                    store(self.registers, n * LANES, load(self.registers, n * LANES, lanes) + weighted, lanes)
            for n, (i, lanes) in enumerate(some):
                store(self.acc, g * self.width + i, load(self.registers, n * LANES, lanes), lanes)

    def _finish(self, t: Expr, g: Expr) -> None:
        p = self.p
        head = self.index * self.group + g
        if p.parts > 1:
            out, start = self.kern["o"], let((head * p.parts + self.part) * (p.d + 2))
            for i, lanes in pieces(p.d):
                store(out, start + i, load(self.acc, g * self.width + i, lanes), lanes)
            T.buffer_store(out, self.m[g], [start + p.d])
            T.buffer_store(out, self.total[g], [start + p.d + 1])
            return
        inverse = let(T.float32(1.0) / self.total[g])
        if p.quant is not None:
            first = let(t * blocks(p.H * p.d) + head * (p.d // BLOCK))
            for b in range(p.d // BLOCK):
                at = g * self.width + b * BLOCK
                low, high = (let(load(self.acc, at + i) * splat(inverse)) for i in (0, LANES))
                write_block(self.kern, first + b, low, high, p.quant)
            return
        start = let(t * (p.H * p.d) + head * p.d)
        for i, lanes in pieces(p.d):
            store(self.kern["o"], start + i, load(self.acc, g * self.width + i, lanes) * splat(inverse, lanes), lanes)


def _ring_row(kern: Kernel, p: CachedAttention, head: Expr, token: Expr) -> Expr:
    """The row that `token` replaces, what it held moved to the reservoir where its block is drawn."""
    window = p.N - p.prefix - p.block * p.blocks
    behind = let(token - p.prefix)
    row = T.Cast("int32", tirx.Select(behind < 0, token, p.prefix + behind % window) if p.prefix else token % window)
    row = let(row)
    if p.blocks:
        left = let(behind - window)
        with T.If(left >= 0), T.Then():
            place = let(_draw(let(left // p.block), p.blocks, p.seed))
            with T.If(place < p.blocks), T.Then():
                kept = let(T.Cast("int32", p.prefix + window + place * p.block + left % p.block))
                for cache in ("past_k", "past_v"):
                    for i, lanes in pieces(p.d):
                        value = load(kern[cache], head + row * p.d + i, lanes)
                        store(kern[cache], head + kept * p.d + i, value, lanes)
    return row


def _draw(j: Expr, blocks: int, seed: int) -> Expr:
    """`draw` of ops/sparse_attention.py in int64."""
    z = let((T.int64(FACTORS[0]) * (j + 1) + FACTORS[1] * (seed + 1)) % MODULUS)
    for shift in SHIFTS:
        z = let((z * z + shift) % MODULUS)
    return tirx.Select(j < blocks, j, z % (j + 1))
