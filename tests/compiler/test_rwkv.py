"""RWKV from a .pth file through the whole chain: PyTorch, onnxruntime, the library, aarch64; one read and one write of
the state a token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import edgeseq
import edgeseq.cli as cli
from edgeseq.verify.tolerances import tolerance
from exporters import export
from tests.models import blink, rwkv_numpy

SLOW = pytest.mark.slow
CASES = [
    pytest.param(4, "onnx", "none"),
    pytest.param(6, "ort", "none"),
    pytest.param(7, "onnx", "none"),
    pytest.param(5, "onnx", "none", marks=SLOW),
    pytest.param(6, "onnx", "none", marks=SLOW),
    pytest.param(7, "ort", "none", marks=SLOW),
    pytest.param(7, "onnx", "int8", marks=SLOW),
]


def made(version: int, folder: Path, target: str = "host", flavour: str = "onnx", quant: str = "none") -> Path:
    """The bundle; its export lies beside it."""
    torch.save(blink.checkpoint(version), folder / "model.pth")
    export(str(folder / "model.pth"), folder / "export", flavour=flavour, quant=quant, chunks=(5,))
    return edgeseq.compile(folder / "export", target, folder / "bundle")


@pytest.mark.parametrize(("version", "flavour", "quant"), CASES)
def test_every_stage_agrees(
    version: int, flavour: str, quant: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = made(version, tmp_path, flavour=flavour, quant=quant)
    report = edgeseq.verify(bundle, export=tmp_path / "export", threads=2)
    assert report.ok, report.failed
    capfd.readouterr()
    assert cli.run(["inspect", str(bundle), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    held = sum(slot["bytes"] for slot in facts["state"])
    width = 3 * blink.D if version == 4 else blink.D * blink.N
    assert held == 4 * blink.L * (2 * blink.D + width)
    assert facts["ledger"]["state_bytes_rw"] <= 2 * held + 4 * blink.L * 2 * blink.D  # previous rows may be read twice


def test_the_library_speaks_the_formulas(tmp_path: Path) -> None:
    """Logits of the loaded bundle against numpy float64, through a chunk, steps, a saved state and a fork."""
    tokens = blink.tokens(24)
    wanted = rwkv_numpy.logits(4, {n: t.numpy() for n, t in blink.checkpoint(4).items()}, tokens)
    limit = tolerance("runtime", "float32", wanted)
    with edgeseq.load(made(4, tmp_path), threads=1) as model, model.session() as session:
        session.prefill(tokens[:13])
        assert np.abs(session.logits - wanted[12]).max() <= limit
        for t in range(13, 18):
            assert np.abs(session.step(tokens[t]) - wanted[t]).max() <= limit
        saved = session.save()
        with session.fork() as other:
            other.prefill(tokens[18:])
            assert np.abs(other.logits - wanted[-1]).max() <= limit
        session.reset()
        assert np.abs(session.step(tokens[0]) - wanted[0]).max() <= limit
        session.load(saved)
        assert np.abs(session.step(tokens[18]) - wanted[18]).max() <= limit


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
@pytest.mark.parametrize("version", [4, 6, 7])
def test_aarch64_agrees(version: int, tmp_path: Path) -> None:
    report = edgeseq.verify(made(version, tmp_path, target="qemu-aarch64"), device="qemu-aarch64")
    assert report.ok, report.failed
