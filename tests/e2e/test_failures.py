"""What goes wrong between a checkpoint and a device: one sentence, the right exit code, nothing left."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from .support import CONTEXT, QEMU, edgeseq, ids, model

SECTIONS = [
    "META", "STRINGS", "TENSORS", "SLOTS", "IO", "GRAPHS",
    "KERNELS", "LAUNCHES", "ARGS", "CODE", "TOKENIZER", "WEIGHTS",
]  # fmt: skip
WRONG_USE, FAILED = 2, 1


def refused(process: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One sentence and at most a hint on stderr, nothing on stdout, nothing of Python's."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == code, process.stderr
    assert process.stdout == "" and lines[0].startswith("edgeseq: ") and len(lines) <= 2, process.stderr
    assert len(lines) == 1 or lines[1].startswith("hint: ")
    assert "Traceback" not in process.stderr and "defect" not in process.stderr
    for word in words:
        assert word in process.stderr, process.stderr


def checkpoint(where: Path, **changes: object) -> Path:
    """The Mamba checkpoint with its configuration changed."""
    shutil.copytree(model("mamba").source, where)
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**config, **changes}))
    return where


def _pickled(where: Path) -> Path:
    checkpoint(where)
    (where / "model.safetensors").unlink()
    (where / "pytorch_model.bin").write_bytes(pickle.dumps({"backbone.embeddings.weight": [0.0]}))
    return where


def _cut_weights(where: Path) -> Path:
    weights = checkpoint(where) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return where


CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], int, tuple[str, ...]]] = {
    "not there": (lambda w: w, WRONG_USE, ("source",)),
    "a wider model than its weights": (lambda w: checkpoint(w, hidden_size=128), FAILED, ("96", "128")),
    "an unknown model type": (lambda w: checkpoint(w, model_type="perceiver"), FAILED, ("perceiver",)),
    "a negative size": (lambda w: checkpoint(w, num_hidden_layers=-1), FAILED, ("-1",)),
    "more layers than it has": (lambda w: checkpoint(w, num_hidden_layers=9), FAILED, ("layers.3",)),
    "weights as a pickle": (_pickled, FAILED, ("safetensors",)),
    "weights cut short": (_cut_weights, FAILED, ("model.safetensors",)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint(name: str, tmp_path: Path) -> None:
    make, code, words = CHECKPOINTS[name]
    source = make(tmp_path / "source")
    kept = sorted(tmp_path.iterdir())
    refused(edgeseq("export", source, "-o", tmp_path / "out"), code, *words)
    assert sorted(tmp_path.iterdir()) == kept


@pytest.mark.parametrize("context", ["0", "1.5", "99999999999"])
def test_a_context_nobody_can_have(context: str, tmp_path: Path) -> None:
    process = edgeseq("export", model("llama-gqa").source, "-o", tmp_path / "out", "--context", context)
    refused(process, WRONG_USE, "context")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["raspberry-pi-6", "host.toml", ""])
def test_an_unknown_target(target: str, tmp_path: Path) -> None:
    refused(edgeseq("compile", model("mamba").export, "--target", target, "-o", tmp_path / "out"), WRONG_USE, target)
    assert list(tmp_path.iterdir()) == []


def damaged(where: Path, change: Callable[[bytearray], object]) -> Path:
    """The host bundle with its plan changed."""
    shutil.copytree(model("mamba").host, where)
    data = bytearray((where / "model.edgeseq").read_bytes())
    change(data)
    (where / "model.edgeseq").write_bytes(data)
    return where


def section(data: bytes, kind: int) -> tuple[int, int]:
    """Offset and length of the section of this kind (1 = META)."""
    for i in range(struct.unpack_from("<I", data, 12)[0]):
        found, _, offset, size, _ = struct.unpack_from("<IIQQQ", data, 64 + 32 * i)
        if found == kind:
            return offset, size
    raise AssertionError(f"no section {kind}")


@pytest.mark.parametrize("name", ["header", "table", *SECTIONS])
def test_a_bundle_cut_within(name: str, tmp_path: Path) -> None:
    """The file ends in the middle of this part."""

    def cut(data: bytearray) -> None:
        offset, size = {"header": (0, 64), "table": (64, 32 * 12)}.get(name) or section(data, SECTIONS.index(name) + 1)
        del data[offset + size // 2 :]

    bundle = damaged(tmp_path / "bundle", cut)
    refused(edgeseq("run", bundle, "--tokens", "1"), FAILED, "bundle")
    refused(edgeseq("inspect", bundle), FAILED, "model.edgeseq")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", [s for s in SECTIONS if s not in ("META", "WEIGHTS", "CODE")])
def test_a_bundle_with_a_flipped_bit_in(name: str, tmp_path: Path) -> None:
    """Weights are checked by `verify`, META is for people; the rest is checked when the model is opened."""

    def flip(data: bytearray) -> None:
        offset, size = section(data, SECTIONS.index(name) + 1)
        data[offset + size // 2] ^= 0x10

    refused(edgeseq("run", damaged(tmp_path / "bundle", flip), "--tokens", "1"), FAILED, "bundle")


@pytest.mark.parametrize("missing", ["model.edgeseq", "libmodel.so"])
def test_a_bundle_without(missing: str, tmp_path: Path) -> None:
    shutil.copytree(model("mamba").host, tmp_path / "bundle")
    (tmp_path / "bundle" / missing).unlink()
    process = edgeseq("run", tmp_path / "bundle", "--tokens", "1")
    refused(process, process.returncode, missing if missing == "libmodel.so" else "bundle")
    assert process.returncode in (FAILED, WRONG_USE)


def test_a_plan_with_another_models_library(tmp_path: Path) -> None:
    shutil.copytree(model("mamba").host, tmp_path / "bundle")
    shutil.copy(model("llama-gqa").host / "libmodel.so", tmp_path / "bundle" / "libmodel.so")
    refused(edgeseq("run", tmp_path / "bundle", "--tokens", "1"), FAILED, "bundle")


def test_what_does_not_fit_the_context(tmp_path: Path) -> None:
    bundle = model("llama-gqa").host
    long = ids([1] * (CONTEXT + 1))
    refused(edgeseq("run", bundle, "--tokens", long, "-n", 0), WRONG_USE, str(CONTEXT), str(CONTEXT + 1))
    refused(edgeseq("run", bundle, "--tokens", "1", "-n", CONTEXT), WRONG_USE, str(CONTEXT))
    state = tmp_path / "state"
    assert edgeseq("run", bundle, "--tokens", ids([1] * 90), "-n", 0, "--save-state", state).returncode == 0
    refused(edgeseq("run", bundle, "--load-state", state, "--tokens", "1,2", "-n", 5), WRONG_USE, "90", str(CONTEXT))


@pytest.mark.parametrize(("token", "code"), [("1009", FAILED), ("2147483648", WRONG_USE), ("-1", WRONG_USE)])
def test_a_token_that_is_none(token: str, code: int) -> None:
    refused(edgeseq("run", model("mamba").host, "--tokens", f"1,{token}", "-n", 1), code, token)


def test_a_state_of_another_model(tmp_path: Path) -> None:
    state, mine = tmp_path / "state", tmp_path / "mine"
    assert edgeseq("run", model("mamba").host, "--tokens", "1,2", "-n", 1, "--save-state", state).returncode == 0
    arguments = ["--load-state", state, "--tokens", "1", "--save-state", mine]
    refused(edgeseq("run", model("llama-gqa").host, *arguments), FAILED, "state")
    data = state.read_bytes()
    other = data[16:20] + bytes([data[20] ^ 1]) + data[21:]  # of the same size, with its own true checksum
    foreign = data[:12] + struct.pack("<I", zlib.crc32(other)) + other
    for broken in (data[:-1], data[:20], b"", data[:60] + bytes([data[60] ^ 1]) + data[61:], data + b"\0", foreign):
        state.write_bytes(broken)
        refused(edgeseq("run", model("mamba").host, *arguments), FAILED, "state")
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_bundle_for_another_machine() -> None:
    import platform

    if platform.machine() == "aarch64":
        pytest.skip("this machine is what the bundle is for")
    refused(edgeseq("run", model("mamba").pi, "--tokens", "1"), FAILED, "libmodel.so")


@pytest.mark.skipif(QEMU is None, reason="qemu-user-static is not installed")
def test_the_driver_refuses_like_the_command(tmp_path: Path) -> None:
    """edgeseq-device speaks for itself: one sentence, 1 failed, 2 wrong use."""
    bundle = model("mamba").pi
    (tmp_path / "cut").write_bytes((bundle / "model.edgeseq").read_bytes()[:-4096])
    (tmp_path / "state").write_bytes(b"ESSTATE\0" + bytes(40))
    good = bundle / "model.edgeseq"
    for code, arguments in (
        (1, [tmp_path / "cut", "info"]), (1, [tmp_path / "nothing", "info"]), (1, [good, "run", "--tokens", "1009"]),
        (1, [good, "run", "--tokens", "1", "--load-state", tmp_path / "state"]), (2, [good, "run"]),
        (2, [good, "sing"]), (2, [good, "run", "--tokens", "1,x"]),
    ):  # fmt: skip
        command = [str(c) for c in (QEMU, bundle / "edgeseq-device", *arguments)]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == code, (arguments, process.stderr)
        assert process.stdout == "" and process.stderr.startswith(("edgeseq-device: ", "usage: "))
