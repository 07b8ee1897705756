"""Modules of the user's own from `step` to the device: exported, verified, compiled, run by name in Python and C."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

import edgeseq
from edgeseq.compiler import compile_export
from edgeseq.errors import ExportError, SourceError, UsageError
from edgeseq.manifest import load_manifest
from edgeseq.models.source import open_source
from edgeseq.verify import verify
from edgeseq.verify.golden import load_golden
from edgeseq.verify.tolerances import tolerance
from exporters import export

from .speech import LIBRIVOX, frames
from .user_modules import Fusion, Layers, WideLayers

HERE = Path(__file__).parent
MODULES = HERE / "user_modules.py"
DENOISER = HERE.parents[1] / "docs" / "examples" / "denoiser.py"
FRAME = 256


def made(source: str, folder: Path, **options: object) -> tuple[Path, Path]:
    """(export, bundle) of a module; both verified."""
    out, bundle = folder / "export", folder / "bundle"
    export(source, out, **options)  # type: ignore[arg-type]
    compile_export(out, "host", bundle)
    for path in (out, bundle):
        report = verify(path)
        assert report.ok, [s for s in report.stages if not s.ok]
    return out, bundle


def test_odd_ranks_types_and_names(tmp_path: Path) -> None:
    _, bundle = made(f"{MODULES}:fusion", tmp_path)
    rng = np.random.default_rng(0)
    module = Fusion()
    memory, n = torch.full((2, 4), 0.5), torch.zeros(1, dtype=torch.int64)
    with edgeseq.load(bundle, poison=True) as model, model.session() as session:
        for _ in range(7):
            gyro, mode = rng.standard_normal(3).astype(np.float32), rng.integers(0, 3, (1, 2))
            pose, count, memory, n = module.step(torch.from_numpy(gyro), torch.from_numpy(mode), memory, n)
            found = session.run({"gyro": gyro, "mode": mode})
            np.testing.assert_allclose(found["pose"], pose.detach().numpy(), atol=1e-6)
            np.testing.assert_array_equal(found["count"], count.numpy())


def test_a_step_without_state(tmp_path: Path) -> None:
    _, bundle = made(f"{MODULES}:counter", tmp_path)
    with edgeseq.load(bundle) as model, model.session() as session:
        x = np.float32([[-1, 0, 2, 3]])
        np.testing.assert_array_equal(session.run({"x": x})["y"], [[1, 1, 3, 4]])


@pytest.mark.parametrize(("name", "wide"), [("rough", True), ("strict", False)])
def test_modules_that_float64_is_hard_for(name: str, wide: bool, tmp_path: Path) -> None:
    """Their goldens are made all the same; where a module refuses to mix dtypes, in float32."""
    out, _ = made(f"{MODULES}:{name}", tmp_path)
    assert ("y" in load_golden(out, load_manifest(out).step.signature).float32) == wide


@pytest.mark.parametrize("threads", [1, 2])
def test_a_state_fades_to_zero_not_through_subnormal_numbers(threads: int, tmp_path: Path) -> None:
    """Those take many CPUs fifty times as long; the caller's own arithmetic keeps them."""
    export(f"{MODULES}:fading", tmp_path / "export")
    compile_export(tmp_path / "export", "host", tmp_path / "bundle")
    tiny = np.finfo(np.float32).tiny
    silence = np.zeros((1, 1, 1 << 15), np.float32)
    with edgeseq.load(tmp_path / "bundle", threads=threads) as model, model.session() as session:
        y = session.run({"x": silence + 2 * tiny})["y"]
        assert (y == 2 * tiny).all()
        assert (session.run({"x": silence})["y"] == tiny).all()
        assert (session.run({"x": silence})["y"] == 0).all()
    assert np.float32(tiny) * np.float32(0.5) > 0


def test_a_token_model_with_step_alone_and_with_chunks(tmp_path: Path) -> None:
    steps, bundle = made(f"{MODULES}:letters", tmp_path / "steps")
    assert [g.file for g in load_manifest(steps).graphs] == ["step.onnx"]
    chunks, other = made(f"{MODULES}:letters_in_chunks", tmp_path / "chunks", chunks=(4,))
    assert [g.file for g in load_manifest(chunks).graphs] == ["step.onnx", "chunk4.onnx"]
    ids = [int(t) for t in np.random.default_rng(3).integers(0, 40, 11)]
    with edgeseq.load(bundle) as one, edgeseq.load(other) as many:
        want, got = one.session().prefill(ids), many.session().prefill(ids)
    assert np.abs(want - got).max() <= tolerance("runtime", "float32", want)


def test_recurrent_layers_of_torch(tmp_path: Path) -> None:
    """LSTM with a projection, GRU and RNN: steps, chunks and PyTorch's own whole sequence agree."""
    _, bundle = made(f"{MODULES}:layers", tmp_path, chunks=(4,))
    module = Layers().eval()
    x = np.random.default_rng(5).standard_normal((1, 8, 20)).astype(np.float32)
    fresh = [torch.full(slot.shape, float(slot.init)) for slot in Layers.state]
    with torch.no_grad():
        want = module.step(torch.from_numpy(x), *fresh)[0].numpy()
    with edgeseq.load(bundle, poison=True) as model, model.session() as one, model.session() as many:
        steps = np.concatenate([one.run({"frame": x[:, i : i + 1]})["y"] for i in range(8)], 1)
        chunks = np.concatenate([many.run({"frame": x[:, i : i + 4]}, 1)["y"] for i in (0, 4)], 1)
    bound = tolerance("runtime", "float32", want)
    assert np.abs(steps - want).max() <= bound and np.abs(chunks - want).max() <= bound


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantised_recurrent_layers_of_torch(quant: str, tmp_path: Path) -> None:
    """Every matrix of theirs is rounded, and the golden knows what rounding their inputs changes."""
    out, _ = made(f"{MODULES}:wide_layers", tmp_path, quant=quant)
    stored = set(load_file(out / "weights.safetensors"))
    matrices = {name for name, p in WideLayers().named_parameters() if p.ndim == 2 and p.numel() >= 64 * 64}
    assert len(matrices) == 14 and {f"{name}.codes" for name in matrices} <= stored
    assert load_golden(out, load_manifest(out).step.signature).noise["y"].largest > 0


def test_a_recurrent_layer_in_both_directions(tmp_path: Path) -> None:
    made(f"{MODULES}:both_ways", tmp_path)


def test_an_operator_that_onnx_cannot_say_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="bessel_j0"):
        export(f"{MODULES}:bessel", tmp_path / "out")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="NoState.state is not a tuple of StateSlot"):
        open_source(f"{MODULES}:no_state")
    with pytest.raises(SourceError, match=r"x is \[1, 4\] a step, so it has no time axis"):
        export(f"{MODULES}:no_axis", tmp_path / "out")
    with pytest.raises(UsageError, match="steps only"):
        export(f"{MODULES}:letters", tmp_path / "out", chunks=(4,))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(f"{DENOISER}:factory", tmp_path_factory.mktemp("denoiser"), chunks=(4,))[1]


def cleaned(session: edgeseq.Session, audio: NDArray, chunk: int = 1) -> NDArray:
    """Audio [n * 256] through the steps, or through graph 1 `chunk` frames at a time; one frame late."""
    rows = audio.reshape(-1, 1, chunk, FRAME)
    graph = 0 if chunk == 1 else 1
    return np.concatenate([session.run({"frame": r}, graph)["clean"].reshape(-1) for r in rows])


def decibel(signal: NDArray, found: NDArray) -> float:
    return float(10 * np.log10(np.square(signal).sum() / np.square(found - signal).sum()))


def test_the_denoiser_removes_noise_from_speech(denoiser: Path) -> None:
    """5 dB become more than 10, by steps and by chunks alike."""
    clip = frames(LIBRIVOX, limit=200, silence=16)[:, -512:].reshape(-1)
    noise = np.random.default_rng(4).standard_normal(len(clip)).astype(np.float32)
    noisy = clip + noise * np.sqrt(np.square(clip).mean() / 10**0.5)
    with edgeseq.load(denoiser) as model:
        by_step = cleaned(model.session(), noisy)
        by_chunk = cleaned(model.session(), noisy, chunk=4)
    speech = slice(16 * 512, -FRAME)  # after the silence in which it learns the noise
    before, after = decibel(clip[speech], noisy[speech]), decibel(clip[speech], by_step[FRAME:][16 * 512 :])
    assert before < 6 and after > 10, (before, after)
    assert np.abs(by_step - by_chunk).max() <= tolerance("runtime", "float32", by_step)


PROGRAM = r"""
#include <edgeseq.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    es_model *model;
    es_session *session;
    void *in;
    const void *clean, *gain;
    size_t n_in, n_clean, n_gain, rows = 0;
    static float frame[256];
    if (argc != 2 || es_model_open(argv[1], NULL, &model, NULL) || es_session_create(model, NULL, 0, &session, NULL))
        return 1;
    if (es_input(session, 0, "frame", &in, &n_in) || es_output(session, 0, "clean", &clean, &n_clean) ||
        es_output(session, 0, "gain", &gain, &n_gain) || es_input(session, 0, "nothing", &in, &n_in) != ES_E_NAME)
        return 2;
    if (es_step(session, 0) != ES_E_NO_TOKENS)
        return 3;
    (void)es_input(session, 0, "frame", &in, &n_in);
    if (n_in != sizeof frame || n_clean != sizeof frame || n_gain != 257 * sizeof(float))
        return 4;
    for (; fread(frame, sizeof frame, 1, stdin) == 1; rows++) {
        memcpy(in, frame, sizeof frame);
        if (es_run(session, 0) != ES_OK)
            return 5;
        fwrite(clean, n_clean, 1, stdout);
    }
    return es_position(session) != rows || es_session_close(&session) || es_model_close(&model);
}
"""


def test_from_c_by_name(denoiser: Path, tmp_path: Path) -> None:
    compiler = ["gcc"] if shutil.which("gcc") else [sys.executable, "-m", "ziglang", "cc"]
    (tmp_path / "clean.c").write_text(PROGRAM)
    out = tmp_path / "clean"
    subprocess.run(
        [*compiler, "-std=c99", "-Wall", "-Werror", str(tmp_path / "clean.c"), "-I", str(denoiser), "-o", str(out),
         str(denoiser / "libmodel.a"), "-lpthread", "-lm"], check=True,
    )  # fmt: skip
    audio = np.random.default_rng(5).standard_normal(40 * FRAME).astype(np.float32)
    done = subprocess.run([out, denoiser / "model.edgeseq"], input=audio.tobytes(), capture_output=True, check=True)
    with edgeseq.load(denoiser) as model:
        want = cleaned(model.session(), audio)
    assert np.frombuffer(done.stdout, np.float32).tobytes() == want.tobytes()
