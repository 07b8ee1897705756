"""The kernel of LongConvStep against numpy before, at and beyond the horizon of its filter; unwritten rows hold NaN."""

from __future__ import annotations

import numpy as np
import pytest

from edgeseq.compiler.kernels.long_conv import LongConv
from edgeseq.compiler.pack import pack
from edgeseq.ops.long_conv import long_conv
from edgeseq.verify.tolerances import tolerance
from tests.ops.test_long_conv import draw, wide

from .library import ON, AnyLibrary, library_on, ref, refs, unset

VARIANTS = [
    LongConv(1, 1, 1, 4, 1),
    LongConv(1, 40, 12, 50, 44, True),
    LongConv(4, 16, 3, 60, 16),
    LongConv(7, 21, 9, 50, 21, True),
    LongConv(13, 33, 40, 50, 40, True),
    LongConv(5, 16, 2, 20, 16, True),
]


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    return library_on(request.param, tmp_path_factory.mktemp("kernels"), refs(VARIANTS))


@pytest.mark.parametrize("p", VARIANTS, ids=lambda p: f"T{p.T}-C{p.C}-L{p.L}")
def test_kernel_equals_its_definition_at_any_position(library: AnyLibrary, p: LongConv) -> None:
    room = p.M - p.T
    for position in sorted({0, 1, 2, min(p.L - 2, room), min(p.L - 1, room), min(p.L, room), room} - {-1}):
        inputs = draw(position, 1, p.T, p.C, p.L, position, room - position, p.skip)
        y, present = long_conv(**wide(inputs))
        held = np.full((p.T, p.ldx), np.nan, np.float32)
        held[:, : p.C] = inputs["x"][0]
        given = inputs | {
            "x": held.reshape(-1)[: (p.T - 1) * p.ldx + p.C].copy(),
            "h": pack("columns16", inputs["h"]),
            "past": inputs["past"][0],
        }
        arrays = [unset(p.T, p.C) if key == "y" else given[key] for key in p.args]
        access = "".join({"past": "m", "y": "w"}.get(key, "r") for key in p.args)
        history, out = library.call(ref(p), arrays, access, seed=position)
        assert np.abs(out - y[0]).max() <= tolerance("runtime", "float32", y), position
        np.testing.assert_array_equal(history, present[0].astype(np.float32))
