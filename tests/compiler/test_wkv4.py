"""The kernel of RWKV-4's average against numpy: any number of channels, rows apart, fresh and extreme states."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.compiler.kernels.wkv4 import PER_BLOCK, Wkv4
from edgeseq.ops.wkv4 import FRESH, wkv4
from edgeseq.verify.tolerances import tolerance

from .library import ON, AnyLibrary, library_on, ref, refs, unset

VARIANTS = [
    Wkv4(1, 1, 1, 1),
    Wkv4(1, 768, 768, 768),
    Wkv4(1, PER_BLOCK + 21, PER_BLOCK + 21, PER_BLOCK + 30),
    Wkv4(7, 16, 20, 16),
    Wkv4(33, 45, 45, 50),
]


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    return library_on(request.param, tmp_path_factory.mktemp("kernels"), refs(VARIANTS))


@pytest.mark.parametrize("p", VARIANTS, ids=lambda p: f"T{p.T}-C{p.C}")
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "used"])
@settings(max_examples=4, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([1.0, 30.0, 200.0]))
def test_kernel_equals_its_definition(library: AnyLibrary, p: Wkv4, fresh: bool, seed: int, spread: float) -> None:
    """Keys far apart overflow e^k (spread 200 reaches e^600): only the maximum in the exponents keeps them finite."""
    rng = np.random.default_rng(seed)

    def rows(ld: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
        held = np.full((p.T, ld), np.nan, np.float32)
        held[:, : p.C] = scale * rng.standard_normal((p.T, p.C))
        return held.reshape(-1)[: (p.T - 1) * ld + p.C].copy(), held[None, :, : p.C].astype(np.float64)

    (k, k64), (v, v64) = rows(p.ldk, spread), rows(p.ldv, 1.0)
    decay, first = rng.uniform(-6, 3, p.C).astype(np.float32), rng.standard_normal(p.C).astype(np.float32)
    past = np.full((3, p.C), FRESH, np.float32)
    if not fresh:
        past = rng.standard_normal((3, p.C)).astype(np.float32)
        past[1], past[2] = np.abs(past[1]) + 0.1, spread * past[2]
    o, present = wkv4(k64, v64, decay, first, past[None].astype(np.float64))
    arrays = [k, v, decay, first, past, unset(p.T, p.C)]
    state, out = library.call(ref(p), arrays, "rrrrmw", [4 * int(rng.integers(0, 4)) for _ in arrays], seed)
    assert np.isfinite(out).all()
    assert np.abs(out - o[0]).max() <= tolerance("runtime", "float32", o) * max(1.0, spread / 10)
    # exponents of some hundreds hold six digits behind them: what they scale is compared as a e^p / (b e^p)
    ratio = state[0].astype(np.float64) / state[1]
    assert np.abs(ratio - present[0, 0] / present[0, 1]).max() <= 1e-5 * max(1.0, spread)
    assert np.abs(state[2] - present[0, 2]).max() <= tolerance("runtime", "float32", present[0, 2])


def test_a_fresh_state_weighs_nothing(library: AnyLibrary) -> None:
    """The first output is the first value, whatever the key."""
    p = VARIANTS[0]
    for key in (-80.0, 0.0, 80.0):
        one = [np.array([x], np.float32) for x in (key, 2.5, 0.3, 0.7)]
        state, out = library.call(ref(p), [*one, np.full((3, 1), FRESH, np.float32), unset(1)], "rrrrmw")
        assert out[0] == 2.5
        assert state[:, 0].tolist() == [2.5, 1.0, key]
