"""Speech detectors from PyPI, compiled from their ONNX files: the same probabilities as onnxruntime, frame by frame."""

from __future__ import annotations

import shutil
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

from .speech import CARDS, frames, on_onnxruntime, packaged

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


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_files_and_makers(name: str, tmp_path: Path) -> None:
    detector = OTHERS[name]
    audio = frames()
    with edgeseq.load(detector.bundle(tmp_path)) as model:
        heard(stream(model.session(), detector, audio), detector.reference(audio))
