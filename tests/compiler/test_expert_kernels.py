"""The kernels of experts on guarded memory, against the definition; experts that nobody chose may hold anything."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseq.compiler.ir import KernelRef
from edgeseq.compiler.kernels.expert_linear import ExpertLinear
from edgeseq.compiler.kernels.expert_linear_q import ExpertLinearQ
from edgeseq.compiler.kernels.expert_order import ExpertOrder
from edgeseq.compiler.pack import pack, packed_shape
from edgeseq.ops.expert_linear import expert_linear
from edgeseq.verify.tolerances import tolerance

from .library import ON, AnyLibrary, library_on, ref, refs
from .test_quantised import GPU, SETS, Draw, rounded, weights

CASES = [  # T, A, E, M, K, S, weights, gates, residual
    ExpertLinear(1, 2, 5, 33, 19, 1, 19),
    ExpertLinear(1, 3, 4, 16, 8, 3, 11, "float16", True),
    ExpertLinear(1, 1, 3, 7, 3, 1, 3, "bfloat16", True, True, 7),
    ExpertLinear(1, 2, 3, 20, 200, 2, 200, "float32", True),
    ExpertLinear(13, 2, 3, 33, 19, 1, 24),
    ExpertLinear(9, 3, 4, 20, 8, 3, 8, "float16", True, True, 25),
    ExpertLinear(40, 2, 2, 5, 17, 1, 17, "float32", True),
]

QUANTISED = [
    ExpertLinearQ(t, a, e, m, k, s, bits, isa, gates, residual, m + 5 if residual else 0)
    for isa in (*SETS, GPU)
    for bits in (4, 8)
    for t, a, e, m, k, s, gates, residual in (
        (1, 2, 5, 33, 70, 1, False, False),
        (1, 3, 4, 16, 1100, 3, True, True),
        (13, 2, 3, 33, 64, 2, False, False),
        (9, 3, 4, 20, 100, 1, True, True),
    )
]


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    quantised = [p for p in QUANTISED if (p.isa == GPU) == (request.param != "cpu")]
    orders = {ExpertOrder(p.T * p.A, p.E) for p in (*CASES, *QUANTISED) if p.T > 1}
    return library_on(request.param, tmp_path_factory.mktemp("experts"), refs([*CASES, *quantised, *orders]))


def strided(rows: NDArray, ld: int) -> NDArray:
    """`rows` [R,C] as memory of rows `ld` apart, NaN between them."""
    wide = np.full((len(rows), ld), np.nan, np.float32)
    wide[:, : rows.shape[1]] = rows
    return wide.reshape(-1)[: (len(rows) - 1) * ld + rows.shape[1]].copy()


def sorted_slots(library: AnyLibrary, p: ExpertLinear | ExpertLinearQ, index: NDArray) -> list[NDArray]:
    order, start = np.zeros(p.T * p.A, np.int32), np.zeros(p.E + 1, np.int32)
    found = library.call(KernelRef("expert_order", ExpertOrder(p.T * p.A, p.E)), [index, order, start], "rww")
    flat = index.reshape(-1)
    for e in range(p.E):
        assert found[0][found[1][e] : found[1][e + 1]].tolist() == np.flatnonzero(flat == e).tolist()
    assert found[1][-1] == (flat >= 0).sum()
    return found


@pytest.mark.parametrize("p", CASES, ids=lambda p: f"t{p.T}a{p.A}s{p.S}{'-sum' if p.gates else ''}")
@pytest.mark.parametrize("none", [False, True])
def test_kernel_equals_the_definition(p: ExpertLinear, none: bool, library: AnyLibrary) -> None:
    rng = np.random.default_rng(p.M + none)
    x = rng.standard_normal((p.T * p.S, p.K)).astype(np.float32)
    index = rng.integers(-1 if none else 0, p.E, (p.T, p.A))
    if none:
        index[0] = -1
    w = rng.standard_normal((p.E, p.M, p.K)).astype(np.float32)
    stored = w.astype(np.float16) if p.wdtype == "float16" else w
    if p.wdtype == "bfloat16":
        stored = (w.view(np.uint32) >> 16).astype(np.uint16)
    meant = (stored.astype(np.uint32) << 16).view(np.float32) if p.wdtype == "bfloat16" else stored.astype(np.float64)
    poisoned = stored.copy()
    poison = np.uint16(0x7FC0) if p.wdtype == "bfloat16" else np.nan
    poisoned[[e for e in range(p.E) if e not in index]] = poison
    gates = rng.standard_normal((p.T, p.A)).astype(np.float32)
    residual = rng.standard_normal((p.T, p.M)).astype(np.float32)
    packed = pack("experts.rows16", poisoned)
    assert packed.size == np.prod(packed_shape("experts.rows16", w.shape))
    routes = [index] if p.T == 1 else sorted_slots(library, p, index)
    inputs = [strided(x, p.ldx), *routes, packed]
    inputs += [gates] if p.gates else []
    inputs += [strided(residual, p.ldr)] if p.residual else []
    y = np.full((p.T, p.M) if p.gates else (p.T, p.A, p.M), np.nan, np.float32)
    (found,) = library.call(KernelRef("expert_linear", p), [*inputs, y], "r" * len(inputs) + "w")
    (wanted,) = expert_linear(
        x.astype(np.float64).reshape(1, p.T, p.S, p.K), index[None], meant.reshape(-1, p.K),
        gates.astype(np.float64)[None] if p.gates else None, p.E,
    )  # fmt: skip
    wanted = wanted[0] + (residual if p.residual else 0.0)
    assert np.abs(found - wanted).max() <= tolerance("runtime", "float32", wanted)


@pytest.mark.parametrize(
    "p", QUANTISED, ids=lambda p: f"{p.isa}-{p.bits}-t{p.T}a{p.A}s{p.S}{'-sum' if p.gates else ''}"
)
def test_quantised_kernel_equals_the_definition(p: ExpertLinearQ, library: AnyLibrary) -> None:
    """One slot of the first token has no expert."""
    if ref(p) not in library.kernels.names:
        pytest.skip("CPU and GPU have instructions of their own")
    d, signed = Draw(p.M), p.bits == 8 and p.isa != "vnni"
    codes, scales, w = (np.stack(x) for x in zip(*(weights(d, p.M, p.K, p.bits) for _ in range(p.E)), strict=True))
    packed = pack("experts.s8x16" if signed else f"experts.q{p.bits}x16", codes, scales)
    q, a, offset = rounded(d.normal(p.T * p.S, p.K), 0 if signed else 1 << p.bits - 1)
    meant = (q * a.astype(np.float64)[..., None]).reshape(p.T * p.S, -1)[:, : p.K]
    index = d.rng.integers(0, p.E, (p.T, p.A))
    index[0, 0] = -1
    gates, residual = d.normal(p.T, p.A), d.normal(p.T, p.M)
    routes = [index] if p.T == 1 else sorted_slots(library, p, index)
    inputs = [q, a, offset, *routes, packed, packed.view(np.float16)]
    inputs += [gates] if p.gates else []
    inputs += [strided(residual, p.ldr)] if p.residual else []
    y = np.full((p.T, p.M) if p.gates else (p.T, p.A, p.M), np.nan, np.float32)
    (found,) = library.call(ref(p), [*inputs, y], "r" * len(inputs) + "w")
    (wanted,) = expert_linear(
        meant.reshape(1, p.T, p.S, p.K), index[None], w.reshape(-1, p.K),
        gates.astype(np.float64)[None] if p.gates else None, p.E,
    )  # fmt: skip
    wanted = wanted[0] + (residual if p.residual else 0.0)
    assert np.abs(found - wanted).max() <= tolerance("runtime", "float32", wanted)
