"""Every CPU kernel against its numpy definition in float64, at odd sizes, on poisoned and guarded memory."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeseq.compiler import kernels
from edgeseq.compiler.kernels.cached_attention import CachedAttention
from edgeseq.compiler.kernels.causal_conv import CausalConv
from edgeseq.compiler.kernels.copy import Copy
from edgeseq.compiler.kernels.embed import Embed
from edgeseq.compiler.kernels.glu import Glu
from edgeseq.compiler.kernels.layer_norm import LayerNorm
from edgeseq.compiler.kernels.linear import Linear
from edgeseq.compiler.kernels.rms_norm import RmsNorm
from edgeseq.compiler.kernels.rotary import Rotary
from edgeseq.compiler.kernels.selective_scan import SelectiveScan
from edgeseq.compiler.pack import pack
from edgeseq.ops import standard
from edgeseq.ops.selective_scan import selective_scan
from edgeseq.verify.tolerances import tolerance

from . import variants
from .library import ON, AnyLibrary, Library, library_on, ref, refs, unset

ELSEWHERE = {
    "attention_chunk": "test_attention.py",
    "attention_merge": "test_attention.py",
    "conv": "test_conv.py",
    "cumulative": "test_sorting.py",
    "dense_scan": "test_scans.py",
    "diag_scan": "test_scans.py",
    "linear_attention_chunk": "test_linear_attention.py",
    "linear_q": "test_quantised.py",
    "embed_q": "test_quantised.py",
    "expert_linear": "test_expert_kernels.py",
    "expert_linear_q": "test_expert_kernels.py",
    "expert_order": "test_expert_kernels.py",
    "gated_scan": "test_gated_scan.py",
    "long_conv": "test_long_conv.py",
    "quantize": "test_quantised.py",
    "top_k": "test_sorting.py",
    "linear_attention": "test_linear_attention.py",
    "wkv4": "test_wkv4.py",
}

few = settings(max_examples=3, derandomize=True, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    return library_on(request.param, tmp_path_factory.mktemp("kernels"), refs(variants.EVERY))


class Draw:
    """Seeded arrays; float32 for the kernel, float64 copies for the reference."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> NDArray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def rows(self, t: int, ld: int, width: int) -> tuple[NDArray, NDArray]:
        """T rows `ld` floats apart as a kernel gets them (nothing behind the last), and [1,T,width] in float64.

        What lies between the rows is NaN: a kernel that reads it shows.
        """
        apart = np.full((t, ld), np.nan, np.float32)
        apart[:, :width] = self.normal(t, width)
        return apart.reshape(-1)[: (t - 1) * ld + width].copy(), apart[None, :, :width].astype(np.float64)

    def shifts(self, n: int) -> list[int]:
        """Byte offsets from a 64-byte boundary: windows into activations begin at any float."""
        return [4 * int(s) for s in self.rng.integers(0, 16, n)]


def close(got: NDArray, want: NDArray) -> None:
    assert got.size == want.size
    difference = np.abs(got.reshape(-1) - want.reshape(-1))
    assert not np.isnan(difference).any(), "NaN: something was not written, or memory that is not data was read"
    assert difference.max(initial=0.0) <= tolerance("runtime", "float32", want)


def wide(x: NDArray) -> NDArray:
    return x.astype(np.float64)


def named(params: list[Any]) -> Any:
    return pytest.mark.parametrize(
        "p", params, ids=[f"{i}-" + "-".join(map(str, vars(p).values())) for i, p in enumerate(params)]
    )


def test_no_kernel_is_forgotten() -> None:
    files = {m.name for m in pkgutil.iter_modules(kernels.__path__) if not m.name.startswith("_")}
    assert files == {ref(p).op for p in variants.EVERY} | set(ELSEWHERE)
    assert all((Path(__file__).parent / name).is_file() for name in ELSEWHERE.values())


def _bfloat16(x: NDArray) -> tuple[NDArray, NDArray]:
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def _stored(x: NDArray, dtype: str) -> tuple[NDArray, NDArray]:
    """(as the bundle stores it, the float32 values that this means)."""
    if dtype == "bfloat16":
        return _bfloat16(x)
    stored = x.astype(dtype)
    return stored, stored.astype(np.float32)


@named(variants.linears())
@few
@given(seed=seeds)
def test_linear(library: AnyLibrary, p: Linear, seed: int) -> None:
    d = Draw(seed)
    x, x64 = d.rows(p.T, p.ldx, p.K)
    stored, w = _stored(d.normal(p.M, p.K), p.wdtype)
    arrays, access = [x, pack("rows16", stored)], "rr"
    want = standard.linear(x64, wide(w))
    if p.bias:
        bias = d.normal(p.M)
        arrays, access, want = [*arrays, bias], access + "r", want + bias
    want = standard.silu(want) if p.act == "silu" else want
    if p.residual:
        residual, r64 = d.rows(p.T, p.ldr, p.M)
        arrays, access, want = [*arrays, residual], access + "r", want + r64
    shifts = [s if i != 1 else 0 for i, s in enumerate(d.shifts(len(arrays) + 1))]
    (y,) = library.call(ref(p), [*arrays, unset(p.T, p.M)], access + "w", shifts, seed)
    close(y, want)


@named(variants.norms())
@few
@given(seed=seeds, scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_rms_norm(library: AnyLibrary, p: RmsNorm, seed: int, scale: float) -> None:
    d = Draw(seed)
    x, x64 = d.rows(p.R, p.ldx, p.D)
    x, x64 = x * np.float32(scale), x64 * np.float32(scale)
    weight = d.normal(p.D)
    arrays = [x, weight, unset(p.R, p.D)] if p.weight else [x, unset(p.R, p.D)]
    (y,) = library.call(ref(p), arrays, "rrw" if p.weight else "rw", d.shifts(len(arrays)), seed)
    close(y, standard.rms_norm(x64, wide(weight) if p.weight else None, p.eps))


@named(variants.layer_norms())
@few
@given(seed=seeds, mean=st.sampled_from([0.0, 100.0]))
def test_layer_norm(library: AnyLibrary, p: LayerNorm, seed: int, mean: float) -> None:
    d = Draw(seed)
    x, _ = d.rows(p.R, p.ldx, p.D)
    x = x + np.float32(mean)  # rounds: the reference reads what the kernel reads
    x64 = np.stack([x[r * p.ldx : r * p.ldx + p.D] for r in range(p.R)]).astype(np.float64)
    optional = [d.normal(p.D) for on in (p.weight, p.bias) if on]
    arrays = [x, *optional, unset(p.R, p.D)]
    (y,) = library.call(ref(p), arrays, "r" * (len(arrays) - 1) + "w", d.shifts(len(arrays)), seed)
    want = (x64 - x64.mean(1, keepdims=True)) / np.sqrt(x64.var(1, keepdims=True) + p.eps)
    want = want * optional[0] if p.weight else want
    close(y, want + optional[-1] if p.bias else want)


@named(variants.embeds())
@few
@given(seed=seeds)
def test_embed(library: AnyLibrary, p: Embed, seed: int) -> None:
    d = Draw(seed)
    stored, table = _stored(d.normal(p.M, p.K), p.wdtype)
    tokens = d.rng.integers(0, p.M, p.T)
    tokens[0] = p.M - 1
    (y,) = library.call(ref(p), [tokens, pack("rows16", stored), unset(p.T, p.K)], "rrw", (), seed)
    assert np.array_equal(y, table[tokens])


@named(variants.convs())
@few
@given(seed=seeds)
def test_causal_conv(library: AnyLibrary, p: CausalConv, seed: int) -> None:
    d = Draw(seed)
    x, x64 = d.rows(p.T, p.ldx, p.C)
    weight, bias, past = d.normal(p.C, p.k), d.normal(p.C), d.normal(p.k - 1, p.C)
    optional = [bias] if p.bias else []
    arrays = [x, pack("transposed", weight), *optional, past, unset(p.T, p.C)]
    present, y = library.call(ref(p), arrays, "rr" + "r" * p.bias + "mw", d.shifts(len(arrays)), seed)
    want, state = standard.causal_conv(x64, wide(weight), wide(bias) if p.bias else None, past[None], p.silu)
    close(y, want)
    assert np.array_equal(present, state[0].astype(np.float32)), "the state is a copy of inputs, to the bit"


@named(variants.scans())
@few
@given(seed=seeds)
def test_selective_scan(library: AnyLibrary, p: SelectiveScan, seed: int) -> None:
    d = Draw(seed)
    u, u64 = d.rows(p.T, p.ldu, p.D)
    dt, dt64 = d.rows(p.T, p.lddt, p.D)
    if p.dt_softplus:
        shift = np.float32(d.rng.choice([-6.0, 0.0, 21.0]))  # tiny steps, usual ones, the linear branch
        dt, dt64 = dt + shift, wide(dt64.astype(np.float32) + shift)
    else:
        dt, dt64 = np.abs(dt), np.abs(dt64)
    B, B64 = d.rows(p.T, p.ldB, p.N)
    C, C64 = d.rows(p.T, p.ldC, p.N)
    A = -np.exp(d.normal(p.N, p.D))
    skip, bias, past = d.normal(p.D), d.normal(p.D), d.normal(p.N, p.D)
    z, z64 = d.rows(p.T, p.ldz, p.D) if p.gate else (None, None)
    optional = [a for a, on in ((skip, p.skip), (z, p.gate), (bias, p.dt_bias)) if on]
    arrays = [u, dt, A, B, C, *optional, past, unset(p.T, p.D)]
    access = "r" * (5 + len(optional)) + "mw"
    present, y = library.call(ref(p), arrays, access, d.shifts(len(arrays)), seed)
    want, state = selective_scan(
        u64, dt64, wide(A), B64, C64, wide(skip) if p.skip else None, z64, wide(bias) if p.dt_bias else None,
        wide(past)[None], int(p.dt_softplus), p.dt_min, p.dt_max,
    )  # fmt: skip
    close(y, want)
    close(present, state)


@named(variants.glus())
@few
@given(seed=seeds, size=st.sampled_from([1.0, 30.0]))
def test_glu(library: AnyLibrary, p: Glu, seed: int, size: float) -> None:
    d = Draw(seed)
    g, g64 = d.rows(p.T, p.ldg, p.M)
    u, u64 = d.rows(p.T, p.ldu, p.M)
    g, g64 = g * np.float32(size), g64 * size
    (y,) = library.call(ref(p), [g, u, unset(p.T, p.M)], "rrw", d.shifts(3), seed)
    close(y, standard.silu(g64) * u64)


@named(variants.rotaries())
@few
@given(seed=seeds)
def test_rotary(library: AnyLibrary, p: Rotary, seed: int) -> None:
    d = Draw(seed)
    x, x64 = d.rows(p.T, p.ldx, p.H * p.d)
    angle = d.rng.uniform(0, 6.3, (1, p.T, p.d // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    (y,) = library.call(ref(p), [x, cos, sin, unset(p.T, p.H * p.d)], "rrrw", d.shifts(4), seed)
    close(y, standard.rotary(x64, wide(cos), wide(sin), p.H, p.interleaved))


@named(variants.attentions())
@settings(max_examples=6, derandomize=True, deadline=None)
@given(seed=seeds, where=st.floats(0, 1), size=st.sampled_from([1.0, 30.0]))
def test_cached_attention(library: AnyLibrary, p: CachedAttention, seed: int, where: float, size: float) -> None:
    """Rows that are not yet written are NaN; scores of `size` make the softmax nearly one-hot."""
    d = Draw(seed)
    position = round(where * (p.N - p.T))
    q, q64 = d.rows(p.T, p.ldq, p.H * p.d)
    q, q64 = q * np.float32(size), q64 * size
    k, k64 = d.rows(p.T, p.ldk, p.Hk * p.d)
    v, v64 = d.rows(p.T, p.ldv, p.Hk * p.d)
    past_k, past_v = d.normal(p.Hk, p.N, p.d), d.normal(p.Hk, p.N, p.d)
    past_k[:, position:], past_v[:, position:] = np.nan, np.nan
    at = np.array([position], np.int64)
    shifts = [*d.shifts(5), 0, *d.shifts(1)]
    arrays = [q, k, v, past_k, past_v, at, unset(p.T, p.H * p.d)]
    present_k, present_v, o = library.call(ref(p), arrays, "rrrmmrw", shifts, seed)
    want, want_k, want_v = standard.cached_attention(
        q64, k64, v64, past_k[None], past_v[None], at, p.H, p.Hk, float(np.float32(p.scale))
    )
    close(o, want)
    assert np.array_equal(present_k, want_k[0].astype(np.float32), equal_nan=True)
    assert np.array_equal(present_v, want_v[0].astype(np.float32), equal_nan=True)


@named(variants.rings())
@settings(max_examples=6, derandomize=True, deadline=None)
@given(seed=seeds, position=st.sampled_from([0, 1, 3, 60, 999, (1 << 40) + 7]))
def test_window_attention(library: AnyLibrary, p: CachedAttention, seed: int, position: int) -> None:
    """Rows that hold no token yet are NaN; positions go beyond 32 bits."""
    d = Draw(seed)
    q, q64 = d.rows(p.T, p.ldq, p.H * p.d)
    k, k64 = d.rows(p.T, p.ldk, p.Hk * p.d)
    v, v64 = d.rows(p.T, p.ldv, p.Hk * p.d)
    past_k, past_v = d.normal(p.Hk, p.N, p.d), d.normal(p.Hk, p.N, p.d)
    past_k[:, position:], past_v[:, position:] = np.nan, np.nan
    at = np.array([position], np.int64)
    shifts = [*d.shifts(5), 0, *d.shifts(1)]
    arrays = [q, k, v, past_k, past_v, at, unset(p.T, p.H * p.d)]
    present_k, present_v, o = library.call(ref(p), arrays, "rrrmmrw", shifts, seed)
    want, want_k, want_v = standard.window_attention(
        q64, k64, v64, past_k[None], past_v[None], at, p.H, p.Hk, float(np.float32(p.scale))
    )
    close(o, want)
    assert np.array_equal(present_k, want_k[0].astype(np.float32), equal_nan=True)
    assert np.array_equal(present_v, want_v[0].astype(np.float32), equal_nan=True)


@named(variants.copies())
def test_copy(library: AnyLibrary, p: Copy) -> None:
    x = np.random.default_rng(p.n).integers(0, 2, p.n).astype(p.dtype)
    (y,) = library.call(ref(p), [x, unset(p.n, dtype=p.dtype)], "rw")
    assert np.array_equal(x, y)


def test_blocks_have_distinct_names_and_grids(library: AnyLibrary, tmp_path: Path) -> None:
    """Equal parameters are one kernel; parameters that the name does not show still get a name of their own."""
    again = Library(tmp_path, refs([variants.norms()[2], variants.norms()[2], RmsNorm(3, 15, 20, 1e-6, True)]))
    assert len(again.kernels.names) == len(again.kernels.grids) == 2
