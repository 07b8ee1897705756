"""Block-quantised kernels: int8 activations to the bit, products exact in integers, on every instruction set here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeseq.compiler.kernels._quantise import BLOCK, blocks
from edgeseq.compiler.kernels.causal_conv import CausalConv
from edgeseq.compiler.kernels.embed_q import EmbedQ
from edgeseq.compiler.kernels.glu import Glu
from edgeseq.compiler.kernels.layer_norm import LayerNorm
from edgeseq.compiler.kernels.linear_q import LinearQ
from edgeseq.compiler.kernels.quantize import Quantize
from edgeseq.compiler.kernels.rms_norm import RmsNorm
from edgeseq.compiler.kernels.selective_scan import SelectiveScan
from edgeseq.compiler.pack import pack
from edgeseq.compiler.targets import resolve

from .library import ON, AnyLibrary, library_on, ref, refs, unset
from .test_kernels import Draw, close

few = settings(max_examples=3, derandomize=True, deadline=None)
seeds = st.integers(0, 2**32 - 1)

FEATURES = set(resolve("host").features)
SETS = ["plain", *(["avx2"] if "avx2" in FEATURES else []), *(["vnni"] if "avx512vnni" in FEATURES else [])]

GPU = "dp4a"

PRODUCTS = [
    LinearQ(t, m, k, bits, isa, bias, bias, m + 3 if bias else 0, "silu" if k == 70 else "none", tile)
    for isa in (*SETS, GPU)
    for bits in (4, 8)
    for t, m, k, bias, tile in (
        (1, 16, 64, False, (8, 2)), (1, 33, 70, True, (8, 2)), (1, 1, 5, False, (4, 1)), (5, 50, 97, True, (4, 1)),
        (13, 64, 128, False, (6, 2)), (3, 30, 31, True, (1, 1)),
    )
]  # fmt: skip
PRODUCTS += [LinearQ(1, 333, 97, bits, isa, streams=3, ahead=bits == 4) for isa in SETS for bits in (4, 8)]
ROUNDINGS = [
    Quantize(t, k, k + gap, zero) for t, k, gap, zero in ((1, 1, 0, 8), (3, 64, 5, 128), (2, 97, 0, 8), (20, 33, 2, 0))
]
TABLES = [EmbedQ(3, 40, k, bits, signed) for k in (1, 64, 97) for bits, signed in ((4, False), (8, False), (8, True))]
SOURCES: list[Any] = [
    RmsNorm(3, 96, 100, 1e-5, True, quant=8),
    RmsNorm(1, 64, 64, 1e-5, False, quant=128),
    LayerNorm(4, 96, 96, 1e-5, True, False, quant=8),
    LayerNorm(1, 128, 128, 1e-5, True, True, quant=0),
    Glu(2, 128, 130, 140, quant=8),
    Glu(1, 1088, 1088, 1088, quant=0),
    CausalConv(5, 128, 4, 256, True, True, quant=8),
    CausalConv(1, 64, 3, 64, False, False, quant=128),
    SelectiveScan(4, 128, 5, 128, 130, 15, 15, 256, skip=True, gate=True, dt_bias=True, quant=8),
    SelectiveScan(1, 64, 16, 64, 64, 32, 32, quant=0),
    SelectiveScan(1, 320, 6, 320, 320, 6, 6, 320, skip=True, gate=True, dt_bias=True, quant=8),
]
FLOATS = [replace(p, quant=None) for p in SOURCES]


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    products = [p for p in PRODUCTS if (p.isa == GPU) == (request.param != "cpu")]
    every = refs([*products, *ROUNDINGS, *TABLES, *SOURCES, *FLOATS])
    return library_on(request.param, tmp_path_factory.mktemp("quantised"), every)


def rounded(x: NDArray, zero: int) -> tuple[NDArray, NDArray, NDArray]:
    """x[T,K] -> codes int8 [T,n,32], scales float32 [T,n], offsets int32 [T,n], n whole pairs of blocks."""
    t, k = x.shape
    padded = np.zeros((t, blocks(k) * BLOCK), np.float32)
    padded[:, :k] = x
    parts = padded.reshape(t, -1, BLOCK)
    top = np.abs(parts).max(axis=2)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    codes = np.rint(parts * inverse[..., None]).astype(np.int8)
    return codes, top * np.float32(1 / 127), -zero * codes.sum(axis=2, dtype=np.int32)


def empty(t: int, k: int) -> list[NDArray]:
    n = blocks(k)
    return [unset(t, n * BLOCK, dtype="int8"), unset(t, n), unset(t, n, dtype="int32")]


def rounded_to(found: list[NDArray], want: NDArray, zero: int) -> None:
    """Codes, scales and offsets of int8 blocks are those of `want`, whose rows are whole blocks."""
    codes, scales, offsets = found
    parts, tops = codes.reshape(-1, BLOCK).astype(np.int64), np.abs(want.reshape(-1, BLOCK)).max(1)
    assert np.array_equal(offsets.reshape(-1), -zero * parts.sum(1))
    np.testing.assert_allclose(scales.reshape(-1) * 127, tops, rtol=1e-4, atol=1e-6)
    error = np.abs(parts * scales.reshape(-1, 1).astype(np.float64) - want.reshape(-1, BLOCK))
    assert (error <= scales.reshape(-1, 1) * 0.501 + 1e-6).all()


def named(params: list[Any]) -> Any:
    names = [f"{i}-{type(p).__name__}-" + "-".join(map(str, vars(p).values())) for i, p in enumerate(params)]
    return pytest.mark.parametrize("p", params, ids=names)


@named(ROUNDINGS)
@few
@given(seed=seeds, zeroed=st.booleans())
def test_activations_are_rounded_to_the_nearest_code(library: AnyLibrary, p: Quantize, seed: int, zeroed: bool) -> None:
    d = Draw(seed)
    x, x64 = d.rows(p.T, p.ldx, p.K)
    if zeroed:
        x[: p.K], x64[0, 0] = 0, 0  # a row of zeros has the scale 0 and the codes 0
    q, scale, offset = library.call(ref(p), [x, *empty(p.T, p.K)], "rwww", [4, 0, 0, 0], seed)
    codes, scales, offsets = rounded(x64[0].astype(np.float32), p.zero)
    assert np.array_equal(q.reshape(codes.shape), codes)
    np.testing.assert_allclose(scale, scales, rtol=2e-7)
    assert np.array_equal(offset, offsets)


def weights(d: Draw, m: int, k: int, bits: int) -> tuple[NDArray, NDArray, NDArray]:
    """MatMulNBits codes uint8 [M,ceil(K/32),4*bits], scales [M,ceil(K/32)], and the float64 matrix [M,K] they mean."""
    n = -(-k // BLOCK)
    u = d.rng.integers(0, 1 << bits, (m, n, BLOCK))
    u[0, 0, :2] = 0, (1 << bits) - 1  # both ends of the range
    scales = d.rng.uniform(0.001, 0.1, (m, n)).astype(np.float16)
    means = ((u - (1 << bits - 1)) * scales.astype(np.float64)[..., None]).reshape(m, -1)[:, :k]
    codes = u if bits == 8 else u[..., 0::2] | u[..., 1::2] << 4
    return codes.astype(np.uint8), scales, means


@named(PRODUCTS)
@few
@given(seed=seeds)
def test_product(library: AnyLibrary, p: LinearQ, seed: int) -> None:
    """Codes at both ends of their range, whole blocks of the largest activation among them."""
    if ref(p) not in library.kernels.names:
        pytest.skip("CPU and GPU have instructions of their own")
    check_product(library, p, seed)


def check_product(library: AnyLibrary, p: LinearQ, seed: int) -> None:
    d = Draw(seed)
    signed = p.bits == 8 and p.isa != "vnni"
    codes, scales, w = weights(d, p.M, p.K, p.bits)
    packed = pack("s8x16" if signed else f"q{p.bits}x16", codes, scales)
    x = d.normal(p.T, p.K)
    x[0, : min(BLOCK, p.K)] = -3.0
    q, a, offset = rounded(x, 0 if signed else 1 << p.bits - 1)
    meant = (q * a.astype(np.float64)[..., None]).reshape(p.T, -1)[:, : p.K]
    want = meant @ w.T
    optional = []
    if p.bias:
        bias = d.normal(p.M)
        optional.append(bias)
        want = want + bias
    want = want / (1 + np.exp(-want)) if p.act == "silu" else want
    if p.residual:
        residual, r64 = d.rows(p.T, p.ldr, p.M)
        optional.append(residual)
        want = want + r64[0]
    arrays = [q, a, offset, packed, packed.view(np.float16), *optional, unset(p.T, p.M)]
    (y,) = library.call(ref(p), arrays, "r" * (len(arrays) - 1) + "w", (), seed)
    close(y, want)


@named(TABLES)
@few
@given(seed=seeds)
def test_embedding(library: AnyLibrary, p: EmbedQ, seed: int) -> None:
    d = Draw(seed)
    codes, scales, table = weights(d, p.M, p.K, p.bits)
    packed = pack("s8x16" if p.signed else f"q{p.bits}x16", codes, scales)
    tokens = d.rng.integers(0, p.M, p.T)
    tokens[0] = p.M - 1
    (y,) = library.call(ref(p), [tokens, packed, packed.view(np.float16), unset(p.T, p.K)], "rrrw", (), seed)
    np.testing.assert_allclose(y, table[tokens], rtol=1e-6)


def norm_inputs(d: Draw, p: RmsNorm) -> tuple[list[NDArray], str, int, int]:
    return [d.rows(p.R, p.ldx, p.D)[0], *([d.normal(p.D)] if p.weight else [])], "", p.R, p.D


def layer_norm_inputs(d: Draw, p: LayerNorm) -> tuple[list[NDArray], str, int, int]:
    return [d.rows(p.R, p.ldx, p.D)[0], *(d.normal(p.D) for on in (p.weight, p.bias) if on)], "", p.R, p.D


def glu_inputs(d: Draw, p: Glu) -> tuple[list[NDArray], str, int, int]:
    return [d.rows(p.T, p.ldg, p.M)[0], d.rows(p.T, p.ldu, p.M)[0]], "", p.T, p.M


def conv_inputs(d: Draw, p: CausalConv) -> tuple[list[NDArray], str, int, int]:
    optional = [d.normal(p.C)] if p.bias else []
    return [d.rows(p.T, p.ldx, p.C)[0], d.normal(p.k, p.C), *optional, d.normal(p.k - 1, p.C)], "m", p.T, p.C


def scan_inputs(d: Draw, p: SelectiveScan) -> tuple[list[NDArray], str, int, int]:
    optional = [d.normal(p.D)] if p.skip else []
    optional += [d.rows(p.T, p.ldz, p.D)[0]] if p.gate else []
    optional += [d.normal(p.D)] if p.dt_bias else []
    reads = [
        d.rows(p.T, p.ldu, p.D)[0],
        d.rows(p.T, p.lddt, p.D)[0] - 3,
        -np.exp(d.normal(p.N, p.D)),
    ]
    reads += [d.rows(p.T, p.ldB, p.N)[0], d.rows(p.T, p.ldC, p.N)[0]]
    return [*reads, *optional, d.normal(p.N, p.D)], "m", p.T, p.D


INPUTS: dict[type, Callable[[Draw, Any], tuple[list[NDArray], str, int, int]]] = {
    RmsNorm: norm_inputs, LayerNorm: layer_norm_inputs, Glu: glu_inputs, CausalConv: conv_inputs,
    SelectiveScan: scan_inputs,
}  # fmt: skip


@named(SOURCES)
@few
@given(seed=seeds)
def test_a_kernel_quantises_what_it_would_have_written(library: AnyLibrary, p: Any, seed: int) -> None:
    """The same kernel with floats, then rounded: states agree to the bit, codes but for ties."""
    inputs, state, t, k = INPUTS[type(p)](Draw(seed), p)
    access = "r" * (len(inputs) - len(state)) + state
    *floats, y = library.call(ref(replace(p, quant=None)), [*inputs, unset(t, k)], access + "w", (), seed)
    kept = [unset(t, k)] if "y" in p.args else []
    *states, q, scale, offset = library.call(
        ref(p), [*inputs, *kept, *empty(t, k)], access + "w" * (3 + len(kept)), (), seed
    )
    codes, scales, offsets = rounded(y, p.quant)
    for got, want in zip(states, [*floats, y], strict=False):
        assert np.array_equal(got, want)
    assert np.abs(q.reshape(codes.shape).astype(int) - codes).max() <= 1, "a tie may round either way"
    assert (q.reshape(codes.shape) != codes).mean() < 0.01
    np.testing.assert_allclose(scale, scales, rtol=1e-6)
    assert np.array_equal(offset, -p.quant * q.reshape(codes.shape).sum(axis=2, dtype=np.int32))
    assert offsets.shape == offset.shape
