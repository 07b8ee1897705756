"""Bundles that differ from the hand-made one where its library does not notice: SLOTS and IO are not in plan_id."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import edgeseq
from edgeseq.errors import RuntimeFailure
from edgeseq.runtime import Model

from . import handmade
from .handmade import Parts


def opened(base: Path, directory: Path, p: Parts) -> Model:
    directory.mkdir(exist_ok=True)
    shutil.copy(base / "libmodel.so", directory)
    (directory / "model.edgeseq").write_bytes(p.build())
    return edgeseq.load(directory, threads=1)


INITS = [
    ("float32", 0, "<f4", -1e30), ("float16", 1, "<f2", 1.5), ("float16", 1, "<f2", 1e-7),
    ("float16", 1, "<f2", 65519.0), ("float16", 1, "<f2", 65520.0), ("float16", 1, "<f2", -1e30),
    ("float16", 1, "<f2", 0.1), ("float16", 1, "<f2", 6.1e-5), ("bfloat16", 2, "bfloat16", -1e30),
    ("bfloat16", 2, "bfloat16", 0.1), ("int64", 3, "<i8", -(2.0**40)), ("int32", 4, "<i4", -7.0),
    ("int8", 5, "<i1", -128.0), ("uint8", 6, "<u1", 255.0), ("bool", 7, "<u1", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "numpy", "init"), INITS, ids=[f"{n}-{i}" for n, _, _, i in INITS])
def test_a_fresh_state_has_its_initial_value(
    handmade_bundle: Path, tmp_path: Path, name: str, number: int, numpy: str, init: float
) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16 if numpy == "bfloat16" else numpy)
    size = dtype.itemsize
    p = handmade.parts()
    p.slots.append([p.name("extra"), number, 1, 0, -1, init, 5, 0, 0, 0, p.state_bytes, 5 * size])
    p.state_bytes += 64
    with opened(handmade_bundle, tmp_path / "b", p) as model:
        session = model.session()
        got = session.save()[-5 * size :]
        assert model.info.slots[-1].dtype == name
        with np.errstate(over="ignore"):
            want = np.full(5, np.float32(init)).astype(dtype).tobytes()
        assert got == want
        session.prefill([1, 2, 3])
        session.reset()
        assert session.save()[-5 * size :] == want


def narrow(p: Parts) -> None:
    """tokens and position as int32."""
    for io in p.io:
        if io[3] in (1, 2):
            io[1], io[11] = 4, io[11] // 2


def test_tokens_and_position_may_be_int32(handmade_bundle: Path, tmp_path: Path) -> None:
    p = handmade.parts()
    narrow(p)
    with opened(handmade_bundle, tmp_path / "b", p) as model:
        session = model.session()
        session.prefill([5, 9, 11, 31, 2])
        views = {(t.name, t.graph): session._view(t).copy() for t in model.info.io if not t.is_output}
        assert views["tokens", 0].tolist() == [[2]] and views["tokens", 0].dtype == np.int32
        assert views["position", 0].tolist() == [4]
        session.prefill([7, 6, 5, 4])
        (chunk,) = [session._view(t).tolist() for t in model.info.io if t.name == "tokens" and t.graph == 1]
        assert chunk == [[7, 6, 5, 4]]


def test_a_model_without_tokens_runs_on_named_inputs(handmade_bundle: Path, tmp_path: Path) -> None:
    p = handmade.parts()
    for io in p.io:
        io[3] = 0 if io[3] == 1 else io[3]
    with opened(handmade_bundle, tmp_path / "b", p) as model:
        session = model.session()
        assert not model.info.takes_tokens
        for call in (lambda: session.step(1), lambda: session.generate_timed(1)):
            with pytest.raises(RuntimeFailure, match="takes no tokens"):
                call()
        reference = handmade.Reference()
        for frame in (3, 8):
            out = session.run({"tokens": np.full((1, 1), frame)})
            np.testing.assert_allclose(out["logits"][0, 0], reference.step(frame), rtol=2e-6, atol=2e-4)
        out = session.run({"tokens": np.array([[1, 2, 3, 4]])}, graph=1)
        for frame in (1, 2, 3, 4):
            want = reference.step(frame)
        np.testing.assert_allclose(out["logits"][0, 0], want, rtol=2e-6, atol=2e-4)
        assert session.position == 6


def test_a_plan_without_a_tokenizer_says_so(handmade_bundle: Path, tmp_path: Path) -> None:
    p = handmade.parts()
    p.tokenizer = struct.pack("<I", 0)
    with opened(handmade_bundle, tmp_path / "b", p) as model:
        assert model.info.tokenizer == "none"
        with pytest.raises(RuntimeFailure, match="no tokenizer of its own"):
            model.encode("a")


def test_a_session_too_large_for_the_machine_is_refused(handmade_bundle: Path, tmp_path: Path) -> None:
    p = handmade.parts()
    p.graphs[2][4] = 2**62
    with opened(handmade_bundle, tmp_path / "large", p) as model:
        assert model.info.session_bytes > 2**62
        with pytest.raises(RuntimeFailure, match="no memory for a session"):
            model.session()
    p.graphs[2][4] = 2**64 - 1
    with pytest.raises(RuntimeFailure, match="more memory than this machine can address"):
        opened(handmade_bundle, tmp_path / "larger", p)


def test_a_state_of_the_other_model_is_foreign(handmade_bundle: Path, tmp_path: Path) -> None:
    p = handmade.parts()
    p.model_id = bytes(range(1, 17))
    with opened(handmade_bundle, tmp_path / "b", p) as theirs, edgeseq.load(handmade_bundle, threads=1) as ours:
        session = theirs.session()
        session.prefill([1])
        with pytest.raises(edgeseq.errors.BundleError, match="another model"):
            ours.session().load(session.save())
