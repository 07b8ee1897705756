"""The kernels of DiagScan and DenseScan against numpy: any number of channels and modes, rows of the input apart."""

from __future__ import annotations

import numpy as np
import pytest

from edgeseq.compiler.kernels.dense_scan import DenseScan
from edgeseq.compiler.kernels.diag_scan import DiagScan
from edgeseq.compiler.pack import pack
from edgeseq.ops import all_ops
from edgeseq.verify.tolerances import tolerance
from tests.ops.test_scans import draw

from .library import ON, AnyLibrary, library_on, ref, refs, unset

VARIANTS = [
    DiagScan(1, 1, 1, 1),
    DiagScan(1, 40, 4, 40, skip=True),
    DiagScan(7, 16, 5, 20),
    DiagScan(33, 45, 11, 50, skip=True),
    DiagScan(3, 37, 6, 37, skip=True, shared=True),
    DiagScan(1, 16, 9, 16, shared=True),
    DenseScan(1, 1, 1, 1),
    DenseScan(1, 40, 8, 40, skip=True),
    DenseScan(5, 33, 11, 40, skip=True),
    DenseScan(9, 16, 16, 16),
]


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    return library_on(request.param, tmp_path_factory.mktemp("kernels"), refs(VARIANTS))


def columns(array: np.ndarray) -> np.ndarray:
    return pack("columns16", array.reshape(-1, array.shape[-1]))


@pytest.mark.parametrize("p", VARIANTS, ids=lambda p: f"{type(p).__name__}-T{p.T}-C{p.C}-N{p.N}")
@pytest.mark.parametrize("seed", [0, 1])
def test_kernel_equals_its_definition(library: AnyLibrary, p: DiagScan | DenseScan, seed: int) -> None:
    name, shared = type(p).__name__, getattr(p, "shared", False)
    inputs = draw(name, seed, 1, p.T, p.C, p.N, p.skip, shared)
    y, present = all_ops()[name].reference(**{key: x.astype(np.float64) for key, x in inputs.items()})
    held = np.full((p.T, p.ldu), np.nan, np.float32)
    held[:, : p.C] = inputs["u"][0]
    packed = {key: columns(x) for key, x in inputs.items() if key in ("a", "b", "c")}
    if shared:
        packed["a"] = inputs["a"].reshape(-1)
    given = inputs | packed | {"u": held.reshape(-1)[: (p.T - 1) * p.ldu + p.C].copy(), "past": inputs["past"][0]}
    arrays = [unset(p.T, p.C) if key == "y" else given[key] for key in p.args]
    rng = np.random.default_rng(seed)
    access = "".join({"past": "m", "y": "w"}.get(key, "r") for key in p.args)
    state, out = library.call(ref(p), arrays, access, [4 * int(rng.integers(0, 4)) for _ in arrays], seed)
    assert np.abs(out - y[0]).max() <= tolerance("runtime", "float32", y)
    assert np.abs(state - present[0]).max() <= tolerance("runtime", "float32", present)
