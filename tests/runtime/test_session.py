"""Sessions through the Python binding: step = chunk = whole, states that travel, refusals that change nothing."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

import edgeseq
from edgeseq.errors import BundleError, RuntimeFailure, UsageError
from edgeseq.runtime import Model, Session

from . import build, handmade

TOKENS = np.random.default_rng(7).integers(0, handmade.V, 60)


def expected(tokens: np.ndarray) -> np.ndarray:
    reference = handmade.Reference()
    return np.stack([reference.step(int(t)) for t in tokens])


def silent(session: Session) -> bool:
    """Whether the session has no logits."""
    try:
        _ = session.logits
    except RuntimeFailure as refusal:
        return "no logits" in refusal.sentence
    return False


def close(left: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_allclose(left, right, rtol=2e-6, atol=2e-4)


def test_steps_follow_the_definition(model: Model) -> None:
    with model.session() as session:
        for token, logits in zip(TOKENS, expected(TOKENS)):
            close(session.step(int(token)), logits)
        assert session.position == len(TOKENS)


@pytest.mark.parametrize("seed", range(8))
def test_any_cut_of_a_prompt_is_the_same(model: Model, seed: int) -> None:
    """Random pieces of 1 to 20 tokens, and empty ones, the state saved and loaded into a new session between them."""
    rng = np.random.default_rng(seed)
    want, session, at = expected(TOKENS), model.session(), 0
    while at < len(TOKENS):
        n = int(rng.integers(1, 21))
        session.prefill(TOKENS[at : at + n])
        at = min(at + n, len(TOKENS))
        assert session.position == at
        close(session.prefill([]), want[at - 1])
        if rng.random() < 0.3:
            state, session = session.save(), model.session()
            session.load(state)
            assert silent(session)
    close(session.prefill([1]), expected(np.append(TOKENS, 1))[-1])


def test_a_fork_and_its_origin_go_their_own_ways(model: Model) -> None:
    session = model.session()
    session.prefill(TOKENS[:10])
    fork = session.fork()
    close(fork.logits, expected(TOKENS[:10])[-1])
    session.step(1)
    close(fork.step(2), expected(np.append(TOKENS[:10], 2))[-1])
    close(session.step(3), expected(np.append(TOKENS[:10], [1, 3]))[-1])


def test_reset_is_a_fresh_start(model: Model) -> None:
    session = model.session()
    fresh = session.save()
    session.prefill(TOKENS)
    session.reset()
    assert session.position == 0 and silent(session) and session.save() == fresh
    close(session.prefill(TOKENS), expected(TOKENS)[-1])


def test_the_context_is_refused_before_anything_changes(model: Model) -> None:
    session = model.session()
    session.prefill(TOKENS)
    state, logits = session.save(), session.logits
    with pytest.raises(RuntimeFailure, match="5 more tokens after 60 would outgrow the context of 64"):
        session.prefill([1, 2, 3, 4, 5])
    assert session.save() == state and np.array_equal(session.logits, logits)
    session.prefill([1, 2, 3, 4])
    with pytest.raises(RuntimeFailure, match="context"):
        session.step(1)


@pytest.mark.parametrize("bad", [-1, handmade.V, 2**31, 2**40])
def test_a_foreign_token_is_refused_before_anything_changes(model: Model, bad: int) -> None:
    session = model.session()
    session.prefill(TOKENS[:5])
    state = session.save()
    with pytest.raises(RuntimeFailure, match=f"token id {bad} is not in the vocabulary of 32"):
        session.prefill([1, bad, 2])
    assert session.save() == state


def test_tokens_must_be_integers(model: Model) -> None:
    with pytest.raises(UsageError, match="float64"):
        model.session().prefill([1.5])


def test_a_saved_state_follows_the_document(model: Model) -> None:
    session = model.session()
    session.prefill(TOKENS[:5])
    data = session.save()
    magic, version, crc, model_id, position, size = struct.unpack_from("<8sII16sQQ", data)
    assert (magic, version, model_id, position) == (b"ESSTATE\0", 1, bytes(range(16)), 5)
    assert crc == zlib.crc32(data[16:]) and size == len(data) - 48
    e = handmade.embedding()[TOKENS[:5]]
    s = np.zeros(handmade.C, np.float32)
    for row in e:
        s = s / 2 + row
    want = s.tobytes() + e.tobytes() + struct.pack("<i", 3 + sum(range(5)))
    assert data[48:] == want, "overwrite slots whole, append slots by rows below the position"


def test_every_defect_of_a_state_has_its_sentence(model: Model) -> None:
    session = model.session()
    session.prefill(TOKENS[:5])
    good = session.save()
    session.step(1)
    before = session.save()

    def sealed(data: bytes) -> bytes:
        return data[:12] + struct.pack("<I", zlib.crc32(data[16:])) + data[16:]

    def patched(at: int, value: bytes) -> bytes:
        return good[:at] + value + good[at + len(value) :]

    cases = {
        "truncated": good[:-1],
        "truncated: 7": good[:7],
        "truncated: 40": good[:40],
        "not a saved state": b"X" + good[1:],
        "version 2": sealed(patched(8, b"\2")),
        "damaged": patched(60, bytes([good[60] ^ 1])),
        "another model": sealed(patched(16, b"\xff")),
        "the context ends at 64": sealed(patched(32, struct.pack("<Q", 65))),
        "this model's has": sealed(patched(32, struct.pack("<Q", 6))),
        "follow the state's end": sealed(good + b"\0"),
    }
    for sentence, data in cases.items():
        with pytest.raises(BundleError, match=sentence):
            session.load(data)
    assert session.save() == before and not silent(session)
    session.load(good)
    assert session.save() == good and silent(session)


def test_sessions_of_one_model_run_from_many_threads(model: Model) -> None:
    want, failures = expected(TOKENS), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with model.session() as session:
            for _ in range(5):
                session.reset()
                at = 0
                while at < len(TOKENS):
                    n = int(rng.integers(1, 13))
                    logits = session.prefill(TOKENS[at : at + n])
                    at = min(at + n, len(TOKENS))
                    if not np.allclose(logits, want[at - 1], rtol=2e-6, atol=2e-4):
                        failures.append((seed, at))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_info_says_what_the_file_says(model: Model) -> None:
    info = model.info
    assert (info.vocab_size, info.context, info.tokenizer) == (handmade.V, handmade.N, "bytes")
    assert info.model_id == bytes(range(16)).hex()
    gpu = info.backend != "cpu"
    assert [g.tokens for g in info.graphs] == [1, 4, 8]
    assert [g.n_launches for g in info.graphs] == [4 if gpu else 3] * 3
    assert [(s.name, s.dtype, s.shape, s.update, s.axis) for s in info.slots] == [
        ("s", "float32", (1, 16), "overwrite", None),
        ("h", "float32", (1, 64, 16), "append", 1),
        ("m", "int32", (1,), "overwrite", None),
    ]
    assert [(t.name, t.role, t.is_output) for t in info.io if t.graph == 2] == [
        ("tokens", "tokens", False), ("position", "position", False), ("logits", "logits", True),
        *([("next", "next", True)] if gpu else []),
    ]  # fmt: skip
    assert info.weight_bytes == 2 * 32 * 16 * 4
    blocks = info.state_bytes + info.io_bytes + info.arena_bytes
    if gpu:
        assert info.device_session_bytes == blocks and info.session_bytes < info.state_bytes
        assert info.device.startswith(("OpenCL, ", "CUDA, ")) and info.threads == 1
    else:
        assert info.device_session_bytes == 0 and info.session_bytes > blocks
        assert info.device.startswith(f"CPU, {info.threads} thread")


def test_named_inputs_and_outputs(model: Model) -> None:
    """The same model driven as if its steps were not tokens."""
    session = model.session()
    out = session.run({"tokens": TOKENS[None, :4].astype(np.int64)}, graph=1)
    close(out["logits"][0, 0], expected(TOKENS[:4])[-1])
    assert session.position == 4
    with pytest.raises(UsageError, match="no input 'frame'"):
        session.run({"frame": TOKENS})
    with pytest.raises(UsageError, match=r"int64 \[1, 1\], got int32 \[1\]"):
        session.run({"tokens": np.zeros(1, np.int32)})
    with pytest.raises(RuntimeFailure, match="vocabulary"):
        session.run({"tokens": np.full((1, 1), 99)})
    assert session.position == 4


def test_text_round_trip(model: Model) -> None:
    assert model.decode([5, 10]) == "\x05\n"
    assert model.encode("aé") == list("aé".encode())


def test_closed_things_say_so(handmade_bundle: Path) -> None:
    model = edgeseq.load(handmade_bundle, threads=1)
    session = model.session()
    model.close()
    model.close()
    with pytest.raises(RuntimeFailure, match="session is closed"):
        session.step(1)
    with pytest.raises(RuntimeFailure, match="is closed"):
        model.session()


def test_a_session_keeps_its_model_alive(handmade_bundle: Path) -> None:
    session = edgeseq.load(handmade_bundle, threads=2).session()
    close(session.prefill(TOKENS), expected(TOKENS)[-1])


def test_a_forked_process_goes_on_alone(handmade_bundle: Path) -> None:
    """The pool's threads stay behind; the caller drains every launch itself, and closing does not wait for them."""
    model = edgeseq.load(handmade_bundle, threads=2)
    session = model.session()
    session.prefill(TOKENS[:20])
    child = os.fork()
    if child == 0:
        good = np.allclose(session.step(3), expected(np.append(TOKENS[:20], 3))[-1], rtol=2e-6, atol=2e-4)
        model.close()
        os._exit(0 if good else 1)
    for _ in range(1000):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    close(session.step(3), expected(np.append(TOKENS[:20], 3))[-1])


def test_threads_default_to_the_cores(handmade_bundle: Path) -> None:
    with edgeseq.load(handmade_bundle) as model:
        assert model.info.threads == len(os.sched_getaffinity(0))
    with pytest.raises(UsageError, match="0 threads"):
        edgeseq.load(handmade_bundle, threads=0)


def test_pinning(handmade_bundle: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with edgeseq.load(handmade_bundle, threads=2, cores=[core]) as model:
        close(model.session().prefill(TOKENS), expected(TOKENS)[-1])
    with pytest.raises(RuntimeFailure, match="cannot be pinned to core 1000"):
        edgeseq.load(handmade_bundle, threads=2, cores=[core, 1000])


def test_bundles_that_are_not(handmade_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        edgeseq.load(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no model\.edgeseq"):
        edgeseq.load(tmp_path)
    (tmp_path / "model.edgeseq").write_bytes(b"EDGESEQ\0")
    (tmp_path / "libmodel.so").write_bytes(b"not a library")
    with pytest.raises(RuntimeFailure, match="cannot be loaded here"):
        edgeseq.load(tmp_path)
    (tmp_path / "libmodel.so").write_bytes((handmade_bundle / "libmodel.so").read_bytes())
    with pytest.raises(BundleError, match="8 bytes, too few"):
        edgeseq.load(tmp_path)


def test_a_library_of_another_plan_is_refused(tmp_path: Path) -> None:
    directory = build.bundle(tmp_path / "other")
    p = handmade.parts()
    p.launches[2][1] = 0
    (directory / "model.edgeseq").write_bytes(p.build())
    with pytest.raises(RuntimeFailure, match="the library was compiled for plan"):
        edgeseq.load(directory)


def test_weights_are_checked_on_request(handmade_bundle: Path, tmp_path: Path) -> None:
    with edgeseq.load(handmade_bundle, threads=1) as model:
        model.check_weights()
    data = bytearray((handmade_bundle / "model.edgeseq").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.edgeseq").write_bytes(data)
    (tmp_path / "libmodel.so").write_bytes((handmade_bundle / "libmodel.so").read_bytes())
    with edgeseq.load(tmp_path, threads=1) as model, pytest.raises(BundleError, match="the weights are damaged"):
        model.check_weights()


def test_measurements_are_positive(model: Model) -> None:
    assert model.measure_read_bandwidth(np.zeros(1 << 22, np.uint8), repeats=2) > 1e8
    assert 0 < model.measure_launch(8, 200) < 1e7
    with pytest.raises(RuntimeFailure, match="out of range"):
        model.measure_read_bandwidth(np.zeros(8, np.uint8))
