"""Tests mean what llama-bench's mean, and what cannot be measured is refused before anything runs."""

from __future__ import annotations

import pytest

from edgeseq.bench.cases import Case, check_context, make_cases
from edgeseq.errors import UsageError


def names(*arguments: object) -> list[str]:
    return [case.name for case in make_cases(*arguments)]  # type: ignore[arg-type]


def test_defaults_are_those_of_llama_bench() -> None:
    assert names(None, None, None, ()) == ["pp512", "tg128"]
    assert names((64,), None, None, ()) == ["pp64", "tg128"]
    assert names((0,), (8,), None, ()) == ["tg8"]


def test_every_length_at_every_depth_by_rising_depth() -> None:
    assert names((8, 16), (4,), (32, 0), ()) == ["pp8", "pp16", "tg4", "pp8 @ d32", "pp16 @ d32", "tg4 @ d32"]
    assert names((8, 8), (0,), (0, 0), ()) == ["pp8"]


def test_context_asks_for_generation_at_depths() -> None:
    assert names(None, None, None, (1024, 128)) == ["tg64 @ d128", "tg64 @ d1024"]
    assert names((8,), (2,), None, (128,)) == ["pp8 @ d128", "tg2 @ d128"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [(((0,), (0,), None, ()), "nothing to measure"), ((None, None, (1,), (2,)), "exclude each other")],
)
def test_refusals(arguments: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        make_cases(*arguments)  # type: ignore[arg-type]


def test_a_context_is_filled_and_not_exceeded() -> None:
    check_context([Case(0, 64, 64), Case(128, 0, 0)], "x", 128)
    check_context([Case(0, 64, 1 << 20)], "x", 0)
    with pytest.raises(UsageError, match="tg65 @ d64 needs a context of 129, x has 128"):
        check_context([Case(0, 64, 64), Case(0, 65, 64)], "x", 128)
