"""The kernel of all matrix-state recurrences against numpy, over rules, decays, heads and ragged sizes."""

from __future__ import annotations

import math
import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeseq.compiler.kernels._emit import LANES
from edgeseq.compiler.kernels.linear_attention import LinearAttention, build, token_tile
from edgeseq.compiler.kernels.linear_attention_chunk import LinearAttentionChunk
from edgeseq.compiler.kernels.linear_attention_chunk import build as build_chunk
from edgeseq.ops.dplr_scan import dplr_scan
from edgeseq.ops.standard import linear_attention
from edgeseq.verify.tolerances import tolerance

from .library import ON, AnyLibrary, Library, library_on, ref, refs, unset

TOKENS = 8
KINDS = [*product(("none", "constant", "head", "key"), ("none", "key")), ("key", "free")]


def variants() -> list[LinearAttention]:
    """Each rule at T = 1, within a tile, across tiles, with shared keys, shared states and rows apart."""
    rng = np.random.default_rng(5)
    found = []
    for decay, erase in KINDS:
        for tokens, (heads, q_heads, k_heads), k, v in (
            (1, (2, 2, 2), 32, 64),
            (1, (4, 2, 2) if erase != "free" else (4, 4, 4), 5, 7),
            (1, (1, 1, 1), 8, 65),
            (4, (2, 2, 2), 8, 49),
            (3, (2, 4, 1) if erase != "free" else (2, 2, 2), 19, 32),
            (TOKENS + 3, (3, 3, 3), int(rng.integers(1, 40)), int(rng.integers(1, 40))),
            (2 * TOKENS, (1, 1, 1), 16, 16),
        ):
            gap = int(rng.integers(0, 3)) * 5
            width = {"none": 0, "constant": 0, "head": heads, "key": heads * k}[decay]
            found.append(
                LinearAttention(
                    tokens, heads, k, v, q_heads, k_heads,
                    q_heads * k + gap, k_heads * k, heads * v + gap, decay, erase,
                    width and width + gap, {"none": 0, "key": heads + gap, "free": heads * k}[erase],
                    heads * k + gap if erase == "free" else 0, float(rng.uniform(0.2, 2)),
                    token_tile((12, 2)) if tokens < TOKENS else (3, 1) if gap else (TOKENS, 2),
                )
            )  # fmt: skip
    return found


def chunks() -> list[LinearAttentionChunk]:
    """Products: around the lengths of sub-chunks, shared and repeated heads, odd widths, strips of V, both tiles."""
    found = []
    shapes = (
        (33, (4, 2, 2), 5, 7, (6, 4)),
        (64, (6, 1, 1), 32, 64, (6, 4)),
        (47, (2, 4, 1), 19, 65, (6, 1)),
        (17, (3, 3, 3), 16, 49, (6, 4)),
        (8, (4, 4, 1), 1, 17, (6, 1)),
        (16, (1, 1, 1), 600, 72, (6, 4)),
    )
    for (i, decay), (j, (tokens, (heads, q_heads, k_heads), k, v, tile)) in product(
        enumerate(("none", "constant", "head", "key")), enumerate(shapes)
    ):
        if (i + j) % 2:
            continue  # each decay has half of the shapes: they take seconds to compile
        width = {"none": 0, "constant": 0, "head": heads, "key": heads * k}[decay]
        found.append(
            LinearAttentionChunk(
                tokens, heads, k, v, q_heads, k_heads, q_heads * k + 5, k_heads * k + 3, heads * v + 1, decay,
                ldg=width and width + 2, scale=0.3, tile=tile,
            )
        )  # fmt: skip
    return found


VARIANTS = variants()
CHUNKS = chunks()


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    on_cpu = CHUNKS if request.param == "cpu" else []
    return library_on(request.param, tmp_path_factory.mktemp("kernels"), refs([*VARIANTS, *on_cpu]))


class Draw:
    """Seeded memory of `tokens` rows `ld` floats apart, NaN between them, and the rows alone as float64 [1,T,width]."""

    def __init__(self, seed: int, tokens: int) -> None:
        self.rng, self.tokens = np.random.default_rng(seed), tokens

    def rows(self, ld: int, width: int, kind: str = "normal", heads: int = 1) -> tuple[NDArray, NDArray]:
        """kind: normal, negative or extreme (log decay), below one (beta), unit (vectors of a head)."""
        held = np.full((self.tokens, ld), np.nan, np.float32)
        drawn = self.rng.standard_normal((self.tokens, heads, width // heads))
        if kind == "negative":
            drawn = -np.abs(drawn)
        elif kind == "extreme":
            drawn = self.rng.choice([0.0, -0.01, -3.0, -50.0], drawn.shape)
        elif kind == "below one":
            drawn = self.rng.uniform(0, 1, drawn.shape)
        elif kind == "unit":
            drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
        held[:, :width] = drawn.reshape(self.tokens, width)
        return held.reshape(-1)[: (self.tokens - 1) * ld + width].copy(), held[None, :, :width].astype(np.float64)


@pytest.mark.parametrize("p", VARIANTS, ids=lambda p: f"{p.decay}-{p.erase}-T{p.T}-H{p.Hq}.{p.Hk}.{p.H}-{p.K}x{p.V}")
@settings(max_examples=3, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_kernel_equals_its_definition(library: AnyLibrary, p: LinearAttention, seed: int) -> None:
    _check(library, p, seed)


@pytest.mark.parametrize("p", CHUNKS, ids=lambda p: f"{p.decay}-T{p.T}-H{p.Hq}.{p.Hk}.{p.H}-{p.K}x{p.V}")
@settings(max_examples=3, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6), decays=st.sampled_from(("negative", "extreme")))
def test_products_equal_the_definition(library: AnyLibrary, p: LinearAttentionChunk, seed: int, decays: str) -> None:
    if not isinstance(library, Library):
        pytest.skip("a GPU goes token by token")
    _check(library, p, seed, decays)


def _check(library: AnyLibrary, p: LinearAttention, seed: int, decays: str = "negative") -> None:
    d = Draw(seed, p.T)
    q, q64 = d.rows(p.ldq, p.Hq * p.K)
    k, k64 = d.rows(p.ldk, p.Hk * p.K, "unit" if p.erase == "key" else "normal", p.Hk)
    v, v64 = d.rows(p.ldv, p.H * p.V)
    past = d.rng.standard_normal((p.H, p.K, p.V)).astype(np.float32)
    past64, arrays, g64, beta64 = past[None].astype(np.float64), [q, k, v], None, None
    if p.decay == "constant":
        arrays.append(-d.rng.uniform(0, 2, p.H).astype(np.float32))
        g64 = np.broadcast_to(arrays[-1].astype(np.float64), (1, p.T, p.H))
    elif p.decay != "none":
        g, g64 = d.rows(p.ldg, p.H * (p.K if p.decay == "key" else 1), decays)
        arrays.append(g)
    if p.erase == "free":
        a, a64 = d.rows(p.lda, p.H * p.K, "unit", p.H)
        b, b64 = d.rows(p.ldb, p.H * p.K, "unit", p.H)
        arrays += [a, b]
        o, state = dplr_scan(q64, k64, v64, g64, a64, b64, past64, p.H, p.scale)
    else:
        if p.erase == "key":
            beta, beta64 = d.rows(p.ldb, p.H, "below one")
            arrays.append(beta)
        rule = ("gated_" if g64 is not None else "") + ("delta" if p.erase == "key" else "")
        rule = rule.rstrip("_") or "linear"
        o, state = linear_attention(q64, k64, v64, past64, g64, beta64, rule, p.Hq, p.Hk, p.scale)
    arrays += [past, unset(p.T, p.group * p.H * p.V)]
    shifts = [4 * int(d.rng.integers(0, 4)) for _ in arrays]
    present, out = library.call(ref(p), arrays, "r" * (len(arrays) - 2) + "mw", shifts, seed)
    assert np.abs(out - o[0]).max() <= tolerance("runtime", "float32", o)
    assert np.abs(present - state[0]).max() <= tolerance("runtime", "float32", state)


def accesses(p: LinearAttention, name: str) -> tuple[int, int]:
    """Floats of argument `name` that one block loads and stores, counted in the kernel's own text."""
    make = build_chunk if isinstance(p, LinearAttentionChunk) else build
    text = make("kernel", p).func.script().splitlines()
    buffer = next(line.split("=")[0].strip() for line in text if line.rstrip().endswith(f"data={name})"))
    used = re.compile(rf"\b{buffer}\[")
    loops, loads, stores = [(0, 1)], 0, 0
    for line in text:
        indent = len(line) - len(line.lstrip())
        while loops[-1][0] >= indent > 0:
            loops.pop()
        times = math.prod(n for _, n in loops)
        if found := re.match(r"\s*for \w+ in range\((\d+)\):", line):
            loops.append((indent, int(found[1])))
        elif used.search(line):
            assert " = " in line
            target, _, source = line.partition(" = ")
            stores += times * LANES * bool(used.search(target))
            loads += times * LANES * len(used.findall(source))
    return loads, stores


@pytest.mark.parametrize("tokens", [1, TOKENS, 64])
@pytest.mark.parametrize(("decay", "erase"), KINDS)
def test_the_state_is_read_once_and_written_once(tokens: int, decay: str, erase: str) -> None:
    """For each pass over the strip: one token, one tile of tokens, or any number of tokens where scratch holds it."""
    key, value, heads = 24, 64, 2
    p = LinearAttention(
        tokens, heads, key, value, heads, heads, 48, 48, 128, decay, erase,
        48 if decay == "key" else heads, 48 if erase == "free" else heads, 48, tile=(TOKENS, 2),
    )  # fmt: skip
    blocks = value // (p.strip * LANES)
    passes = 1 if erase != "none" else -(-tokens // TOKENS)
    assert accesses(p, "past") == (passes * key * value // blocks, passes * key * value // blocks)
    if tokens == 1:
        assert accesses(p, "o") == (0, value // blocks)


@pytest.mark.parametrize("decay", ["none", "constant", "head", "key"])
def test_products_read_and_write_the_state_once(decay: str) -> None:
    """For any number of tokens."""
    p = LinearAttentionChunk(
        100, 2, 24, 64, 2, 2, 48, 48, 128, decay, ldg={"head": 2, "key": 48}.get(decay, 0)
    )  # fmt: skip
    assert accesses(p, "past") == (24 * 64, 24 * 64)
