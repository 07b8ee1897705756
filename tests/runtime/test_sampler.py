"""The sampler against its definition in numpy: same order of operations, same generator, same choice."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from edgeseq import runtime_abi as abi
from edgeseq.errors import RuntimeFailure
from edgeseq.runtime import Model, Sampling


@pytest.fixture(scope="module")
def library(handmade_bundle: Path) -> ctypes.CDLL:
    return abi.open_library(handmade_bundle / "libmodel.so")


def pick(library: ctypes.CDLL, sampler: abi.Sampler, logits: np.ndarray, recent: list[int] | None = None) -> int:
    """One choice; the sampler's seed moves on. Statuses other than 0 raise."""
    logits = np.ascontiguousarray(logits, np.float32)
    scratch, ids, token = np.zeros_like(logits), np.array(recent or [0], np.int32), ctypes.c_int32(-1)
    floats, ints = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_int32)
    status = library.es_sample_logits(
        ctypes.byref(sampler), logits.ctypes.data_as(floats), len(logits), ids.ctypes.data_as(ints),
        len(recent or []), scratch.ctypes.data_as(floats), ctypes.byref(token),
    )  # fmt: skip
    if status:
        raise ValueError(library.es_status_text(status).decode())
    return token.value


def uniform(seed: int) -> tuple[float, int]:
    """splitmix64: a number in [0, 1) and the next seed."""
    mask = 2**64 - 1
    seed = (seed + 0x9E3779B97F4A7C15) & mask
    z = seed
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53, seed


def probabilities(s: abi.Sampler, logits: np.ndarray, recent: list[int]) -> np.ndarray:
    """The definition, with sorting, in float64; not normalised."""
    x = logits.astype(np.float64).copy()
    for i in set(recent):
        x[i] = x[i] / s.repetition_penalty if x[i] > 0 else x[i] * s.repetition_penalty
    p = np.exp((x - x.max()) / s.temperature)
    order = np.argsort(-p, kind="stable")
    keep = np.ones(len(p), bool)
    if s.top_k:
        keep[order[s.top_k :]] = False
    if s.top_p < 1:
        mass = np.cumsum(p[order] * keep[order])
        keep[order[np.searchsorted(mass, s.top_p * (p * keep).sum()) + 1 :]] = False
    return p * keep * (p >= s.min_p)


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_choices_follow_the_definition(library: ctypes.CDLL, settings: dict[str, float]) -> None:
    rng = np.random.default_rng(3)
    sampler = abi.Sampler(**{"top_p": 1.0, "repetition_penalty": 1.0, **settings}, seed=11)
    seed, seen = 11, set()
    for _ in range(200):
        logits = rng.standard_normal(97) * 3
        recent = rng.integers(0, 97, 5).tolist()
        p = probabilities(sampler, logits.astype(np.float32), recent)
        u, seed = uniform(seed)
        ends = np.cumsum(p)
        goal = u * ends[-1]
        token = pick(library, sampler, logits, recent)
        seen.add(token)
        before = ends[token] - p[token]
        assert p[token] > 0, "a token that the filters exclude"
        assert before - 1e-5 <= goal <= ends[token] + 1e-5
        assert sampler.seed == seed
    assert len(seen) > 20, "the draws vary"


def test_frequencies_are_the_probabilities(library: ctypes.CDLL) -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    sampler = abi.Sampler(temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=5)
    counts = np.bincount([pick(library, sampler, logits) for _ in range(20000)], minlength=4)
    np.testing.assert_allclose(counts / 20000, [0.5, 0.25, 0.15, 0.1], atol=0.015)


def test_ties_are_cut_in_order(library: ctypes.CDLL) -> None:
    sampler = abi.Sampler(temperature=1.0, top_p=1.0, repetition_penalty=1.0, top_k=3, seed=1)
    assert {pick(library, sampler, np.zeros(10)) for _ in range(200)} == {0, 1, 2}
    sampler = abi.Sampler(temperature=1.0, top_p=0.35, repetition_penalty=1.0, seed=1)
    assert {pick(library, sampler, np.zeros(10)) for _ in range(200)} == {0, 1, 2, 3}


def test_greedy_takes_the_first_of_the_largest_and_skips_nan(library: ctypes.CDLL) -> None:
    greedy = abi.Sampler(top_p=1.0, repetition_penalty=1.0, seed=9)
    assert pick(library, greedy, np.array([1, 3, 3, 2.0])) == 1
    assert pick(library, greedy, np.array([np.nan, -5, -np.inf, -4])) == 3
    assert pick(library, greedy, np.array([1, np.inf, 3])) == 1
    assert greedy.seed == 9
    drawn = abi.Sampler(temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=9)
    assert pick(library, drawn, np.array([np.nan, np.inf, 3])) == 1
    with pytest.raises(ValueError, match="no logit is a number"):
        pick(library, greedy, np.array([np.nan, np.nan]))


def test_the_penalty_counts_a_token_once(library: ctypes.CDLL) -> None:
    greedy = abi.Sampler(top_p=1.0, repetition_penalty=2.0)
    assert pick(library, greedy, np.array([3.0, 2.0, -1.0]), [0, 0, 0]) == 1
    assert pick(library, greedy, np.array([3.9, 1.0, -1.0]), [0, 0, 0]) == 0
    assert pick(library, greedy, np.array([-1.0, -1.5, -3.0]), [0]) == 1
    with pytest.raises(ValueError, match="vocabulary"):
        pick(library, greedy, np.zeros(3), [3])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1},
        {"top_k": -1}, {"repetition_penalty": 0.0}, {"temperature": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_out_of_range(model: Model, wrong: dict[str, float]) -> None:
    session = model.session()
    session.prefill([1, 2, 3])
    with pytest.raises(RuntimeFailure, match="sampler parameter"):
        session.sample(Sampling(**wrong))  # type: ignore[arg-type]


def test_generate_is_sample_and_step_and_repeats_with_its_seed(model: Model) -> None:
    def stream(sampling: Sampling) -> list[int]:
        session = model.session()
        session.prefill([1, 2, 3])
        return list(session.generate(30, sampling, recent=[1, 2, 3]))

    warm = Sampling(temperature=40.0, top_k=20, repetition_penalty=1.3, seed=4)
    assert stream(warm) == stream(warm)
    assert len({tuple(stream(Sampling(temperature=40.0, seed=i))) for i in range(5)}) > 1
    session = model.session()
    session.prefill([1, 2, 3])
    by_hand = []
    for _ in range(30):
        by_hand.append(int(np.argmax(session.logits)))
        session.step(by_hand[-1])
    assert stream(Sampling()) == by_hand
    timed = model.session()
    timed.prefill([1, 2, 3])
    tokens, ns = timed.generate_timed(30)
    assert tokens == by_hand and len(ns) == 30 and (ns > 0).all() and timed.position == 33
