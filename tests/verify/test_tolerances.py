"""The tolerance scales with the reference and never grows from a broken one."""

from __future__ import annotations

import numpy as np
import pytest

from edgeseq.errors import UsageError
from edgeseq.verify.tolerances import TABLE, tolerance


@pytest.mark.parametrize("stage", TABLE)
def test_the_scale_is_the_largest_element_but_at_least_one(stage: str) -> None:
    assert tolerance(stage, "float32", np.array([0.1, -0.2])) == pytest.approx(1e-5)
    assert tolerance(stage, "float32", np.array([3.0, -40.0])) == pytest.approx(4e-4)
    assert tolerance(stage, "float32", np.array([])) == pytest.approx(1e-5)


@pytest.mark.parametrize("broken", [np.inf, -np.inf, np.nan])
def test_a_reference_that_is_not_finite_allows_nothing(broken: float) -> None:
    assert tolerance("onnx", "float32", np.array([1.0, broken])) == 0.0


def test_a_pair_that_the_table_lacks() -> None:
    with pytest.raises(UsageError, match="int3 at stage 'onnx'"):
        tolerance("onnx", "int3", 0.0)
