"""Speech detectors from PyPI, compiled from their ONNX files: the same probabilities as onnxruntime, frame by frame."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgeseq
from devices.profile import load_profile
from devices.transports import open_transport
from edgeseq.compiler import ImportOptions, compile_onnx
from edgeseq.verify.tolerances import tolerance
from runtimes import C_DIR

from .speech import CARDS, FRAME, LIBRIVOX, RATE, frames, on_onnxruntime, packaged

PER_FRAME = (1, 576)


@dataclass(frozen=True)
class Detector:
    package: str
    file: str
    audio: str
    answer: str
    state: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return packaged(self.package, self.file)

    def bundle(self, folder: Path, target: str = "host") -> Path:
        pairs = ",".join(f"{a}:{b}" for a, b in self.state.items())
        return compile_onnx(self.path, target, folder / "bundle", ImportOptions((pairs,), **self.options))

    def reference(self, audio: NDArray) -> NDArray[np.float32]:
        return on_onnxruntime(self.path, audio, (self.audio, self.answer), self.state, self.constants)


def silero(file: str, **options: Any) -> Detector:
    return Detector("silero_vad", f"data/{file}", "input", "output", {"state": "stateN"}, options)


SIXTEEN_K = {"values": {"sr": "16000"}, "shapes": {"input": PER_FRAME}}
IFLESS = replace(
    silero("silero_vad_op18_ifless.onnx", dims={"batch": 1}, **SIXTEEN_K), constants={"sr": np.array(16000)}
)
OTHERS = {
    "nested-if": replace(
        silero("silero_vad.onnx", values={"sr": "16000"}, shapes={"input": PER_FRAME, "state": (2, 1, 128)}),
        constants={"sr": np.array(16000)},
    ),
    "opset-15": replace(
        silero("silero_vad_16k_op15.onnx", dims={"batch": 1}, **SIXTEEN_K), constants={"sr": np.array(16000)}
    ),
    "lstm-node": Detector(
        "silero_vad", "data/silero_vad_16k_sequence.onnx", "input", "speech_probs", {"h": "hn", "c": "cn"},
        {"dims": {"sequence_length": 1}},
    ),
    "gru-node": Detector(
        "akiki", "models/akiki-vad.onnx", "audio_with_context", "probability", {"h": "h_out"}
    ),
}  # fmt: skip


def heard(found: NDArray, want: NDArray) -> None:
    assert want.max() > 0.9 and want.min() < 0.1, "the clip has speech and silence, the model knows which"
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= tolerance("runtime", "float32", want)


def stream(session: edgeseq.Session, detector: Detector, audio: NDArray) -> NDArray[np.float32]:
    return np.array([session.run({detector.audio: f[None]})[detector.answer].reshape(-1)[0] for f in audio])


@pytest.fixture(scope="module")
def ifless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return IFLESS.bundle(tmp_path_factory.mktemp("silero"))


def test_silero_on_this_machine(ifless: Path) -> None:
    audio = frames()
    want = IFLESS.reference(audio)
    with edgeseq.load(ifless, poison=True) as model:
        assert model.info.state_bytes == 1024 and not model.info.takes_tokens
        session = model.session()
        heard(stream(session, IFLESS, audio), want)
        session.reset()
        first = stream(session, IFLESS, audio[:60])
        other = model.session()
        other.load(session.save())
        heard(np.concatenate([first, stream(other, IFLESS, audio[60:])]), want)


def test_silero_says_what_it_said_of_another_clip_and_voice(ifless: Path) -> None:
    audio = frames(CARDS, silence=30)
    with edgeseq.load(ifless) as model:
        heard(stream(model.session(), IFLESS, audio), IFLESS.reference(audio))


def test_silero_on_aarch64(tmp_path: Path) -> None:
    """Compiled for a Raspberry Pi 5 and run emulated: half of the clip in one process, half in the next."""
    profile = load_profile("raspberry-pi-5")
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("qemu-aarch64-static is not installed: apt-get install qemu-user-static")
    audio = frames(limit=60)
    want = IFLESS.reference(audio)
    bundle = IFLESS.bundle(tmp_path, "raspberry-pi-5")
    emulated = replace(profile, transport="qemu")
    with open_transport(emulated) as transport:
        handle = transport.push(bundle)
        source, out, state = (transport.scratch(n) for n in ("in", "out", "state"))
        found = b""
        for half, option in ((audio[:30], "--save-state"), (audio[30:], "--load-state")):
            transport.write(source, half.tobytes())
            transport.driver(
                handle, "frames", "--in", source, "--out", out, option, state, "--threads", "2", "--poison"
            )
            found += transport.read(out)
    heard(np.frombuffer(found, np.float32), want)


def decisions(probabilities: NDArray[np.float32]) -> list[tuple[float, str]]:
    """What the C example says: speech above 0.5 until below 0.35, as (second, word)."""
    said, speech = [], False
    for i, p in enumerate(probabilities):
        if p < 0.35 if speech else p > 0.5:
            speech = not speech
            said.append((round(i * FRAME / RATE, 2), "speech" if speech else "silence"))
    return said


def run_example(bundle: Path, folder: Path, compiler: list[str], runner: list[str]) -> list[tuple[float, str]]:
    out = folder / "speech"
    warnings = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
    source, library = C_DIR / "examples" / "speech.c", bundle / "libmodel.a"
    command = [*compiler, *warnings, "-O1", source, "-I", bundle, "-o", out, library, "-lpthread", "-lm"]
    subprocess.run(command, check=True)
    said = subprocess.run(
        [*runner, out, bundle / "model.edgeseq", LIBRIVOX], capture_output=True, text=True, check=True
    )
    *lines, figures = said.stdout.splitlines()
    found = re.fullmatch(
        r"7\.07 s of sound in ([\d.]+) ms: real-time factor ([\d.]+); a frame of 32 ms takes ([\d.]+) us \(p99 .*\)",
        figures,
    )
    assert found, figures
    assert float(found[1]) / 7070 == pytest.approx(float(found[2]), rel=0.1, abs=1e-4)
    return [(float(second), word) for second, _, word, _ in map(str.split, lines)]


def test_the_c_example_decides_as_onnxruntime_does(ifless: Path, tmp_path: Path) -> None:
    want = decisions(IFLESS.reference(frames(limit=10**6, silence=0)))
    assert len(want) >= 2, "the clip has a pause"
    compiler = ["gcc"] if shutil.which("gcc") else [sys.executable, "-m", "ziglang", "cc"]
    assert run_example(ifless, tmp_path, compiler, []) == want


@pytest.mark.slow
def test_the_c_example_on_aarch64(tmp_path: Path) -> None:
    """The bundle's archive linked into a program for another machine by the compiler that came with edgeseq."""
    if shutil.which("qemu-aarch64-static") is None or not Path("/usr/aarch64-linux-gnu").is_dir():
        pytest.skip("qemu-user-static or libc6-arm64-cross is not installed")
    want = decisions(IFLESS.reference(frames(limit=10**6, silence=0)))
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.28"]
    bundle = IFLESS.bundle(tmp_path, "raspberry-pi-5")
    assert run_example(bundle, tmp_path, zig, ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"]) == want


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_files_and_makers(name: str, tmp_path: Path) -> None:
    detector = OTHERS[name]
    audio = frames()
    with edgeseq.load(detector.bundle(tmp_path)) as model:
        heard(stream(model.session(), detector, audio), detector.reference(audio))
