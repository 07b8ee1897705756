"""One comparison: the worst element, its place, and what is not a number."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgeseq.errors import UsageError
from edgeseq.verify.golden import Golden
from edgeseq.verify.report import Report, Stage, compare
from edgeseq.verify.runtime import greedy_stage
from edgeseq.verify.streams import random_cuts
from edgeseq.verify.tolerances import tolerance


def rows(*values: float) -> np.ndarray:
    return np.array(values, np.float32).reshape(2, -1)


def test_the_worst_element_is_named_by_its_place_in_the_sequence() -> None:
    stage = compare("a", "b", rows(0, 0, 0, 5), rows(0, 1, 0, 2), 4.0, rows=[7, 9])
    assert (stage.worst, stage.where, stage.ok) == (3.0, "token 9, logit 1", True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad: float) -> None:
    stage = compare("a", "b", rows(0, 0, bad, 0), rows(0, 0, 0, 9), 100.0)
    assert stage.worst == float("inf") and not stage.ok and stage.where == "token 1, logit 0"
    report = Report("p", "bundle", "s", "0", "", (stage,))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["stages"][0]["worst"] == "inf"


def test_a_bound_is_met_or_not() -> None:
    got, wanted = np.array([[1.5]]), np.array([[1.0]])
    assert compare("a", "b", got, wanted, 0.5).ok
    assert not compare("a", "b", got, wanted, np.nextafter(0.5, 0)).ok
    assert not compare("a", "b", np.zeros((2, 3)), np.zeros((3, 2)), 1.0).ok


def test_a_report_is_as_good_as_its_worst_stage() -> None:
    good = Stage("near", "x", 0.9, 1.0, "", True)
    better = Stage("far", "x", 0.1, 1.0, "", True)
    bad = Stage("bad", "x", None, None, "", False)
    assert Report("p", "bundle", "s", "0", "", (better, good)).ok
    assert Report("p", "bundle", "s", "0", "", (better, good)).worst == good
    assert Report("p", "bundle", "s", "0", "", (good, bad)).failed == ("bad",)


def test_a_tie_may_be_chosen_either_way_and_nothing_else() -> None:
    wanted = np.array([[1.0, 1.0 + 1e-6, 0.0], [0.0, 2.0, 1.0]], np.float32)
    tied = np.array([[1.0, 0.9, 0.0], [0.0, 2.0, 1.0]], np.float32)
    wrong = np.array([[1.0, 1.1, 0.0], [0.0, 1.0, 1.5]], np.float32)
    golden = Golden(np.array([0, 1]), wanted, {}, {})
    stage = greedy_stage("a", tied, golden)
    assert stage.ok and "1 of them a tie" in stage.note
    stage = greedy_stage("a", wrong, golden)
    assert (stage.ok, stage.worst, stage.where) == (False, 1.0, "token 1: 2, expected 1")


def test_cuts_cover_the_sequence() -> None:
    rng = np.random.default_rng(1)
    plans = [random_cuts(48, rng) for _ in range(20)]
    assert all(sum(cuts) == 48 and min(cuts) > 0 for cuts in plans)
    assert len({tuple(cuts) for cuts in plans}) > 10


def test_a_bound_scales_with_the_reference() -> None:
    assert tolerance("runtime", "float32", [0.1]) == pytest.approx(1e-5)
    assert tolerance("runtime", "float32", [-30.0]) == pytest.approx(3e-4)
    with pytest.raises(UsageError, match="no tolerance"):
        tolerance("runtime", "float8", [0.0])
