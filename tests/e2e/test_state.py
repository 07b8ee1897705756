"""The state of real bundles: any cut is the same, saved and forked anywhere, carried from one machine to another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgeseq
from tests.sessions import moved

from .support import CONTEXT, QEMU, close, done, driver, ids, model

NAMES = ["mamba", "llama-gqa", "retnet"]
emulated = pytest.mark.skipif(QEMU is None, reason="qemu-user-static is not installed")


@pytest.fixture(scope="module", params=NAMES)
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[str, edgeseq.runtime.Model]]:
    with edgeseq.load(model(request.param).host, threads=2, poison=True) as bundle:
        yield request.param, bundle


cuts = st.lists(
    st.tuples(st.integers(1, 21), st.sampled_from(["stay", "save", "fork", "reload"])), min_size=1, max_size=20
)


@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(pieces=cuts, seed=st.integers(0, 2**32 - 1))
def test_any_cut_is_the_whole(
    opened: tuple[str, edgeseq.runtime.Model], pieces: list[tuple[int, str]], seed: int
) -> None:
    """Pieces of 1 (a step) to 21 tokens (16 + 4 + 1), up to the context; logits after each as in the whole form."""
    name, bundle = opened
    m = model(name)
    tokens = m.prompt(min(sum(n for n, _ in pieces), CONTEXT - 1), seed)
    session, at = bundle.session(), 0
    found, ends = [], []
    for n, how in pieces:
        piece = tokens[at : at + n]
        if not piece:
            break
        at += len(piece)
        logits = session.step(piece[0]) if len(piece) == 1 else session.prefill(piece)
        found.append(logits)
        ends.append(at - 1)
        session = moved(session, how)
        assert session.position == at
    m.close(np.stack(found), tokens, ends)


def test_the_last_token_of_the_context(opened: tuple[str, edgeseq.runtime.Model]) -> None:
    name, bundle = opened
    m = model(name)
    tokens = m.prompt(CONTEXT, 3)
    m.close(bundle.session().prefill(tokens), tokens, -1)


@emulated
@pytest.mark.parametrize("name", ["mamba", "llama-gqa", pytest.param("retnet", marks=pytest.mark.slow)])
def test_a_state_travels_to_the_device_and_back(name: str, tmp_path: Path) -> None:
    m = model(name)
    prompt, more, again = m.prompt(21), m.prompt(5, 2), m.prompt(4, 3)
    here, there = tmp_path / "here", tmp_path / "there"
    first = json.loads(done("run", m.host, "--tokens", ids(prompt), "-n", 3, "--json", "--save-state", here))["tokens"]
    second = driver(m.pi, "run", "--load-state", here, "--tokens", ids(more), "-n", 4, "--save-state", there)["tokens"]
    third = json.loads(done("run", m.host, "--load-state", there, "--tokens", ids(again), "-n", 6, "--json"))["tokens"]
    so_far = prompt
    for given_, made in ((None, first), (more, second), (again, third)):
        so_far = so_far if given_ is None else so_far + given_
        choices = m.logits([*so_far, *made])[len(so_far) - 1 : -1].argmax(1)
        assert made == choices.tolist()
        so_far = so_far + made
    assert len(set(first + second + third)) > 2


@emulated
@pytest.mark.parametrize("name", ["mamba", "llama-gqa", pytest.param("retnet", marks=pytest.mark.slow)])
def test_the_state_means_the_same_on_both(name: str, tmp_path: Path) -> None:
    """Not only the tokens: every number of the state agrees, in the same order and layout."""
    m = model(name)
    prompt = m.prompt(30)
    done("run", m.host, "--tokens", ids(prompt), "-n", 0, "--json", "--save-state", tmp_path / "here")
    driver(m.pi, "run", "--tokens", ids(prompt), "-n", 0, "--save-state", tmp_path / "there")
    here, there = ((tmp_path / n).read_bytes() for n in ("here", "there"))
    assert here[16:48] == there[16:48], "model, position and size"
    close(*(np.frombuffer(state[48:], np.float32) for state in (here, there)))
