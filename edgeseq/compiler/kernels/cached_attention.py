"""Causal attention over a KV cache, with the append: one block = one KV head, its T new rows and its query heads.

cache[hk, position + t] <- k[t], v[t];  o[t,h] = softmax_j(scale q[t,h] . K[j]) V,  j <= position + t.
Blocked online softmax (Dao et al. 2022, algorithm 1): running maximum m, sum l and accumulator in float32, one pass
over the cache. Rows above position + t are never read.

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
from ._emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    fill,
    horizontal_sum,
    kernel,
    let,
    load,
    local,
    loop,
    pieces,
    splat,
    store,
)

TILE = 64
NEVER = -1.0e30


@dataclass(frozen=True)
class CachedAttention:
    """T new tokens, H query heads over Hk cached heads of width d, N cache rows; ld*: floats between tokens.

    ring: the cache holds the last tokens and no longer grows: `prefix` first ones stay, behind the ring are `blocks`
    blocks of `block` tokens drawn by `seed`; without either it holds the last N.
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
    args = ("q", "k", "v", "past_k", "past_v", "position", "o")


def build(name: str, p: CachedAttention) -> Built:
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
        head = let(kern.block * (p.N * p.d))
        if p.ring:
            _attend(kern, p, head)
        else:
            position = let(T.Cast("int32", kern["position"][0]))
            loop(p.T, lambda t: _append(kern, p, head, t, position + t))
            _attend(kern, p, head)
    return Built(kern.func, p.Hk)


def _append(kern: Kernel, p: CachedAttention, head: Expr, t: Expr, row: Expr) -> None:
    for new, ld, cache in (("k", p.ldk, "past_k"), ("v", p.ldv, "past_v")):
        for i, lanes in pieces(p.d):
            value = load(kern[new], t * ld + kern.block * p.d + i, lanes)
            store(kern[cache], head + row * p.d + i, value, lanes)


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


def _attend(kern: Kernel, p: CachedAttention, head: Expr) -> None:
    group = p.H // p.Hk
    width = -(-p.d // LANES) * LANES
    scratch, partial = local(LANES), local(LANES)
    scores = local(TILE)
    acc = local(group * width)
    m, total = local(group), local(group)

    def query(t: Expr) -> None:
        fill(acc, group * width)
        fill(m, group, NEVER)
        fill(total, group)
        token = let(kern["position"][0] + T.Cast("int64", t))
        if p.ring:
            _append(kern, p, head, t, _ring_row(kern, p, head, token))
        rows = let(T.Cast("int32", tirx.Select(token < p.N, token + 1, T.int64(p.N)) if p.ring else token + 1))
        with T.serial(tirx.ceildiv(rows, TILE)) as tile:
            first = let(tile * TILE)
            count = let(tirx.Select(rows - first < TILE, rows - first, TILE))
            loop(group, lambda g: _tile(t, g, first, count))
        loop(group, lambda g: finish(t, g))

    def _tile(t: Expr, g: Expr, first: Expr, count: Expr) -> None:
        q0 = let(t * p.ldq + (kern.block * group + g) * p.d)
        fill(scores, TILE, NEVER)
        with T.serial(count) as j:
            k0 = let(head + (first + j) * p.d)
            store(partial, 0, splat(0.0))
            for i, lanes in pieces(p.d):
                product = load(kern["q"], q0 + i, lanes) * load(kern["past_k"], k0 + i, lanes)
                store(partial, 0, load(partial, 0, lanes) + product, lanes)
            total_j = horizontal_sum(scratch, load(partial, 0))
            T.buffer_store(scores, total_j * T.float32(p.scale), [j])
        new_m = let(T.max(m[g], _maximum(scores, scratch)))
        alpha = let(T.exp(m[g] - new_m))
        T.buffer_store(m, new_m, [g])
        store(partial, 0, splat(0.0))
        for i in range(0, TILE, LANES):
            store(scores, i, T.exp(load(scores, i) - splat(new_m)))
            store(partial, 0, load(partial, 0) + load(scores, i))
        T.buffer_store(total, total[g] * alpha + horizontal_sum(scratch, load(partial, 0)), [g])
        for i, lanes in pieces(p.d):
            store(acc, g * width + i, load(acc, g * width + i, lanes) * splat(alpha, lanes), lanes)
        with T.serial(count) as j:
            v0 = let(head + (first + j) * p.d)
            for i, lanes in pieces(p.d):
                at = g * width + i
                weighted = splat(scores[j], lanes) * load(kern["past_v"], v0 + i, lanes)
                store(acc, at, load(acc, at, lanes) + weighted, lanes)

    def finish(t: Expr, g: Expr) -> None:
        inverse = let(T.float32(1.0) / total[g])
        o0 = let(t * (p.H * p.d) + (kern.block * group + g) * p.d)
        for i, lanes in pieces(p.d):
            store(kern["o"], o0 + i, load(acc, g * width + i, lanes) * splat(inverse, lanes), lanes)

    loop(p.T, query)


def _maximum(scores: Buffer, scratch: Buffer) -> Expr:
    """Largest of TILE scores."""
    best = load(scores, 0)
    for i in range(LANES, TILE, LANES):
        best = T.max(best, load(scores, i))
    store(scratch, 0, best)
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        store(scratch, 0, T.max(load(scratch, 0, lanes), load(scratch, lanes, lanes)), lanes)
    return let(scratch[0])
