"""Attention kernels against numpy in float64: chunks in blocks of queries, steps in parts, rings with a prefix and a
reservoir. Rows that hold no token are NaN; every position at which a tile, a part or a ring begins or ends is met."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgeseq.compiler.kernels.attention_chunk import TILE, AttentionChunk
from edgeseq.compiler.kernels.attention_merge import AttentionMerge
from edgeseq.compiler.kernels.cached_attention import LEAST_ROWS, CachedAttention, parts_of
from edgeseq.ops import standard
from edgeseq.ops.sparse_attention import sparse_attention

from .library import ON, AnyLibrary, library_on, ref, refs, unset
from .test_kernels import Draw, close
from .test_quantised import empty, rounded_to

WIDE = (12, 2)
CHUNKS = [
    AttentionChunk(2, 1, 1, 1, 3, 1, 1, 1, 1.0),
    AttentionChunk(7, 4, 4, 64, 130, 256, 256, 256, 0.125, tile=WIDE),
    AttentionChunk(70, 4, 2, 40, 300, 160, 80, 85, 0.2, tile=WIDE),
    AttentionChunk(64, 2, 1, 33, 65, 66, 33, 33, 0.2),
]
RING_CHUNKS = [
    AttentionChunk(6, 4, 2, 10, 9, 40, 20, 20, 0.3, ring=True),
    AttentionChunk(70, 3, 3, 10, 150, 30, 30, 30, 0.3, ring=True),
    AttentionChunk(20, 4, 2, 10, 12, 40, 20, 20, 0.3, ring=True, prefix=3, tile=WIDE),
    AttentionChunk(70, 2, 1, 20, 140, 40, 20, 20, 0.3, ring=True, prefix=75),
    AttentionChunk(9, 2, 1, 20, 6, 40, 20, 20, 0.3, ring=True, prefix=5),
]
PARTS = [
    CachedAttention(1, 6, 1, 20, 700, 120, 20, 20, 0.3, parts=3),
    CachedAttention(1, 4, 2, 70, 260, 280, 140, 140, 0.1, parts=4),
    CachedAttention(1, 3, 3, 16, 200, 48, 48, 48, 0.1, ring=True, prefix=70, parts=3),
]
DRAWN = [
    CachedAttention(1, 4, 2, 10, 15, 40, 20, 20, 0.3, ring=True, prefix=3, block=2, blocks=3, seed=4),
    CachedAttention(9, 4, 2, 20, 80, 80, 40, 40, 0.3, ring=True, prefix=8, block=12, blocks=4, seed=1048575),
    CachedAttention(30, 2, 2, 5, 10, 10, 10, 10, 0.3, ring=True, prefix=0, block=3, blocks=2),
    CachedAttention(1, 2, 1, 5, 10, 10, 5, 5, 0.3, ring=True, prefix=4),
]

QUANTISED = [
    CachedAttention(1, 4, 2, 32, 90, 128, 64, 64, 0.2, quant=8),
    CachedAttention(1, 2, 1, 96, 70, 192, 96, 96, 0.1, ring=True, prefix=5, quant=0),
    CachedAttention(5, 12, 2, 32, 40, 384, 64, 70, 0.2, ring=True, prefix=3, block=2, blocks=3, seed=4, quant=8),
    CachedAttention(1, 6, 2, 64, 300, 384, 128, 128, 0.1, parts=4),
]
"""The last one's merge is what writes int8 blocks."""
ON_GPUS = [
    CachedAttention(5, 12, 2, 32, 40, 384, 64, 70, 0.2, quant=8),
    CachedAttention(5, 12, 2, 32, 40, 384, 64, 70, 0.2, ring=True, quant=0),
]
"""Whose chunks on a CPU are `AttentionChunk`."""


def merge_of(p: CachedAttention, quant: int | None = None) -> AttentionMerge:
    return AttentionMerge(p.H, p.d, p.parts, quant)


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    """What the chosen tests call, no more: a kernel takes seconds to compile."""
    mine = (item for item in request.session.items if getattr(item, "module", None) is request.module)
    chosen = [item.callspec.params for item in mine if hasattr(item, "callspec")]
    found = [PARTS[0], *(params["p"] for params in chosen if "p" in params)]
    merges = [merge_of(p) for p in found if p in PARTS] + [
        merge_of(p, 8) for p in found if p in QUANTISED and p.parts > 1
    ]
    return library_on(request.param, tmp_path_factory.mktemp("kernels"), refs(dict.fromkeys([*found, *merges])))


def some_slow(cases: list[Any], quick: tuple[int, ...]) -> list[Any]:
    """All but the `quick` ones marked slow."""
    return [p if i in quick else pytest.param(p, marks=pytest.mark.slow) for i, p in enumerate(cases)]


def positions(p: AttentionChunk | CachedAttention, seed: int) -> list[int]:
    """Where something begins or ends, and somewhere else; a ring also goes round."""
    edges = [0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE - p.T, p.N // 2, p.N - p.T]
    if p.ring:
        edges += [p.prefix - 1, p.prefix, p.N - 1, p.N, p.N + 1, 2 * p.N + 5, 1 << 29]
    last = 1 << 30 if p.ring else p.N - p.T
    some = int(np.random.default_rng(seed).integers(0, min(last, 3 * p.N) + 1))
    return sorted({x for x in [*edges, some] if 0 <= x <= last})


class Case:
    """One call's arrays, and the answer of the definition; scores of `size` make the softmax nearly one-hot."""

    def __init__(self, p: AttentionChunk | CachedAttention, position: int, size: float = 1.0) -> None:
        self.draw = d = Draw(position % 1000)
        q, q64 = d.rows(p.T, p.ldq, p.H * p.d)
        self.q, q64 = q * np.float32(size), q64 * size
        self.k, k64 = d.rows(p.T, p.ldk, p.Hk * p.d)
        self.v, v64 = d.rows(p.T, p.ldv, p.Hk * p.d)
        self.past = [d.normal(p.Hk, p.N, p.d) for _ in "kv"]
        for x in self.past:
            x[:, position:] = np.nan
        self.at = np.array([position], np.int64)
        given = (q64, k64, v64, self.past[0][None], self.past[1][None], self.at, p.H, p.Hk, float(np.float32(p.scale)))
        if p.ring:
            drawn = (getattr(p, n, default) for n, default in (("prefix", 0), ("block", 1), ("blocks", 0), ("seed", 0)))
            self.want, *present = sparse_attention(*given, *drawn)
        else:
            self.want, *present = standard.cached_attention(*given)
        self.present = [x[0].astype(np.float32) for x in present]

    def run(self, library: AnyLibrary, p: AttentionChunk | CachedAttention) -> np.ndarray:
        """The output; the caches are checked."""
        parts = getattr(p, "parts", 1)
        return self.written(library, p, [unset(p.T, p.H * p.d) if parts == 1 else unset(p.H * parts * (p.d + 2))])[0]

    def written(self, library: AnyLibrary, p: Any, outputs: list[np.ndarray]) -> list[np.ndarray]:
        """All outputs; the caches are checked."""
        shifts = [
            *self.draw.shifts(5),
            0,
            *([0] if len(outputs) > 1 else self.draw.shifts(1)),
            *[0] * (len(outputs) - 1),
        ]
        arrays = [self.q, self.k, self.v, *self.past, self.at, *outputs]
        key, value, *found = library.call(ref(p), arrays, "rrrmmr" + "w" * len(outputs), shifts, int(self.at[0]) % 97)
        for got, want in zip((key, value), self.present, strict=True):
            assert np.array_equal(got, want, equal_nan=True)
        return found


def sizes(p: AttentionChunk | CachedAttention) -> str:
    """What a case is called."""
    return f"T{p.T}-H{p.H}-Hk{p.Hk}-d{p.d}-N{p.N}-prefix{p.prefix}"


@pytest.mark.parametrize("p", some_slow([*CHUNKS, *RING_CHUNKS], (2, 7)), ids=sizes)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_chunk_at_every_edge(library: AnyLibrary, p: AttentionChunk, size: float) -> None:
    for position in positions(p, 0):
        case = Case(p, position, size)
        close(case.run(library, p), case.want)


@pytest.mark.parametrize("p", some_slow(PARTS, (0,)), ids=sizes)
def test_parts_and_their_merge_at_every_edge(library: AnyLibrary, p: CachedAttention) -> None:
    for position in positions(p, 1):
        case = Case(p, position)
        partial = case.run(library, p)
        assert np.isfinite(partial).all()
        (o,) = library.call(ref(merge_of(p)), [partial, unset(p.H, p.d)], "rw", [4, 8], position % 97)
        close(o, case.want)


@pytest.mark.parametrize("p", some_slow(DRAWN, (0,)), ids=sizes)
def test_a_prefix_and_a_reservoir_at_every_edge(library: AnyLibrary, p: CachedAttention) -> None:
    for position in [*positions(p, 2), *range(p.N, p.N + 12)]:
        case = Case(p, position)
        close(case.run(library, p), case.want)


@pytest.mark.parametrize("p", some_slow([*QUANTISED, *ON_GPUS], (0, 3)), ids=sizes)
def test_the_answer_as_int8_blocks(library: AnyLibrary, p: CachedAttention) -> None:
    """By the attention itself or, of parts, by their merge."""
    for position in positions(p, 3):
        case = Case(p, position)
        if p.parts > 1:
            partial = case.run(library, p)
            found, zero = library.call(ref(merge_of(p, 8)), [partial, *empty(1, p.H * p.d)], "rwww"), 8
        else:
            found, zero = case.written(library, p, empty(p.T, p.H * p.d)), p.quant
        rounded_to(found, case.want, zero)


def test_parts_without_rows_weigh_nothing(library: AnyLibrary) -> None:
    """The first token of a stream: all parts but one have seen no row."""
    p = PARTS[0]
    case = Case(p, 0)
    partial = case.run(library, p).reshape(p.H, p.parts, p.d + 2)
    assert (partial[:, 0, p.d + 1] == 1.0).all()
    assert (partial[:, 1:, p.d + 1] == 0.0).all()
    assert (partial[:, 1:, : p.d] == 0.0).all()


def test_a_cache_is_cut_where_heads_are_few_and_rows_many() -> None:
    assert parts_of(8, 1 << 20) == parts_of(1, LEAST_ROWS) == 1
    assert parts_of(1, 1 << 20) == 8
    assert parts_of(3, 1 << 20) == 3
    assert parts_of(1, 4 * LEAST_ROWS) == 4


def test_blocks_of_queries_are_even_and_whole_tiles() -> None:
    p = replace(CHUNKS[2], T=64, H=4, Hk=1)
    assert (p.block_rows, p.row_blocks) == (48, 6)
    assert all(c.block_rows % c.tile[0] == 0 and c.block_rows * c.row_blocks >= c.T * c.group for c in CHUNKS)
