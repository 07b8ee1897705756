"""Real speech, and models that others trained to find it; whoever lacks either skips with its name."""

from __future__ import annotations

import importlib.util
import wave
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

CLIPS = Path("/usr/share/pocketsphinx/test/data")
LIBRIVOX = CLIPS / "librivox/sense_and_sensibility_01_austen_64kb-0870.wav"
CARDS = CLIPS / "cards/001.wav"
RATE, FRAME, CONTEXT = 16000, 512, 64


def packaged(package: str, file: str) -> Path:
    """A file of an installed package, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(found.origin).parent / file


def frames(clip: Path = LIBRIVOX, limit: int = 150, silence: int = 20) -> NDArray[np.float32]:
    """Frames [n,576] as these models take them: 64 samples of the frame before, then 512 new ones, after a silence."""
    if not clip.is_file():
        pytest.skip(f"{clip} is missing: apt-get install pocketsphinx-testdata")
    with wave.open(str(clip)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        data = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    data = np.concatenate([np.zeros(silence * FRAME, np.float32), data])
    n = min(limit, len(data) // FRAME)
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), data[: n * FRAME]])
    return np.stack([padded[i * FRAME : i * FRAME + CONTEXT + FRAME] for i in range(n)])


def on_onnxruntime(
    path: Path, audio: NDArray, names: tuple[str, str], state: dict[str, str], constants: dict[str, Any] | None = None
) -> NDArray[np.float32]:
    """The file as it came, frame by frame: the first output's only number [n]. state: input -> output."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shapes = {i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in session.get_inputs()}
    held = {name: np.zeros(shapes[name], np.float32) for name in state}
    found = []
    for frame in audio:
        feeds = {names[0]: frame[None], **held, **(constants or {})}
        answer, *after = session.run([names[1], *state.values()], feeds)
        held = dict(zip(state, after, strict=True))
        found.append(float(answer.reshape(-1)[0]))
    return np.array(found, np.float32)
