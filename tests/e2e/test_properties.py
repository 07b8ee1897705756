"""The properties of every family on the compiled runtime, for one of each kind of state: streams cut at random, forked,
saved, loaded and rewound; what an earlier stream left in the buffers reaches no later one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import edgeseq
from edgeseq.compiler import compile_export
from edgeseq.models.base import SequenceModel
from edgeseq.runtime import Model, Session
from edgeseq.verify import verify
from edgeseq.verify.tolerances import tolerance
from exporters import export
from tests.every import EVERY
from tests.models.support import ODD, random_model

from .support import QEMU, folder, once

CONTEXT = 48
# a matrix and a running maximum; caches, convolutions and scans in one state
QUICK = ("mlstm-odd", "jamba-odd")
NAMES = [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(ODD.keys() - set(QUICK)))]


@cache
def torch_model(name: str) -> SequenceModel:
    return random_model(ODD[name])


def bundle(name: str, target: str = "host") -> Path:
    """Compiled from a module of the user's own, as which any model in memory can be exported."""

    def make(out: Path) -> None:
        source = folder() / f"{name.replace('-', '_')}_properties.py"
        source.write_text(
            f"from tests.models.support import ODD, random_model\ndef make():\n    return random_model(ODD[{name!r}])\n"
        )
        export(f"{source}:make", out, context=CONTEXT, chunks=(4,))

    exported = once(folder() / f"{name}.properties.export", make)
    return once(folder() / f"{name}.properties.{target}", lambda out: compile_export(exported, target, out))


@pytest.fixture(scope="module", params=NAMES)
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[str, Model]]:
    with edgeseq.load(bundle(request.param), threads=1, poison=True) as model:
        yield request.param, model


def whole(name: str, tokens: list[int]) -> NDArray[np.float32]:
    """Logits [T,V] of the whole sequence in PyTorch."""
    with torch.no_grad():
        return torch_model(name)(torch.tensor([tokens]))[0].numpy()


def drawn(name: str, n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, torch_model(name).config.vocab_size, n).tolist()


def close(got: NDArray[np.float32], want: NDArray[np.float32]) -> None:
    assert np.abs(got - want).max() <= tolerance("runtime", "float32", want)


def consumed(session: Session, tokens: list[int]) -> NDArray[np.float32]:
    return session.step(tokens[0]) if len(tokens) == 1 else session.prefill(tokens)


@pytest.mark.parametrize("name", NAMES)
def test_the_chain_verifies(name: str) -> None:
    """Graphs on stock onnxruntime, then every form in the runtime, against PyTorch."""
    report = verify(bundle(name), export=folder() / f"{name}.properties.export")
    assert report.ok, [s for s in report.stages if not s.ok]


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="qemu-user-static is not installed")
@pytest.mark.parametrize("name", sorted(ODD) if EVERY else sorted(ODD)[::2])
def test_the_chain_verifies_for_aarch64(name: str) -> None:
    report = verify(bundle(name, "raspberry-pi-5"), device="qemu-aarch64")
    assert report.ok, [s for s in report.stages if not s.ok]


MOVES = st.lists(
    st.tuples(st.integers(1, 11), st.sampled_from(["stay", "fork", "save", "rewind"])), min_size=2, max_size=7
)


@settings(max_examples=6, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(moves=MOVES, seed=st.integers(0, 99))
def test_streams_under_random_cuts(opened: tuple[str, Model], moves: list[tuple[int, str]], seed: int) -> None:
    """After every piece the logits of the whole form; `rewind` goes astray and comes back to a saved state."""
    name, model = opened
    tokens = drawn(name, min(CONTEXT - 4, sum(n for n, _ in moves)), seed)
    wanted, session, at = whole(name, tokens), model.session(), 0
    for n, move in moves:
        piece = tokens[at : at + n]
        if not piece:
            break
        if move == "rewind":
            saved = session.save()
            consumed(session, [0, 1, 2])
            session.load(saved)
        elif move == "fork":
            other = session.fork()
            consumed(session, [3])
            session = other
        elif move == "save":
            saved, session = session.save(), model.session()
            consumed(session, [2, 1])
            session.load(saved)
        assert session.position == at
        found = consumed(session, piece)
        at += len(piece)
        close(found, wanted[at - 1])


def test_what_another_stream_left_behind_is_never_read(opened: tuple[str, Model]) -> None:
    """A prompt of 11 is two chunks of four and three steps. State and logits are the same bits in a fresh session and
    after longer prompts have filled every buffer, the tokens behind the last one included."""
    name, model = opened
    tokens = drawn(name, 11, 5)
    fresh, used = model.session(), model.session()
    used.prefill(drawn(name, 23, 6))
    used.reset()
    first, second = fresh.prefill(tokens).copy(), used.prefill(tokens).copy()
    assert first.tobytes() == second.tobytes()
    following = drawn(name, 6, 7)
    assert fresh.prefill(following).tobytes() == used.prefill(following).tobytes()
    assert fresh.save()[:48] == used.save()[:48], "model, position and size"


def test_streams_side_by_side_know_nothing_of_one_another(opened: tuple[str, Model]) -> None:
    name, model = opened
    rows = [drawn(name, 12, seed) for seed in (1, 2, 3)]
    wanted = [whole(name, row) for row in rows]
    sessions = [model.session() for _ in rows]
    for t in range(12):
        for session, row, want in zip(sessions, rows, wanted, strict=True):
            close(session.step(row[t]), want[t])
