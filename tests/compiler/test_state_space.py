"""State space models and long convolutions through the whole chain at odd sizes: PyTorch, onnxruntime, the library,
aarch64; what a device reads each token is what was derived at export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import edgeseq
import edgeseq.cli as cli
from edgeseq.models.source import random_source
from edgeseq.models.twin import family_of_config
from exporters import export
from tests.models.support import ODD

KERNEL = {"s4d-odd": "diag_scan", "s4-odd": "dense_scan", "liquid-s4-odd": "diag_scan", "gss-odd": "diag_scan"}
KERNEL |= {"hyena-odd": "long_conv", "hyena-mixed": "long_conv", "hyena-dna": "long_conv"}
QUICK = {"s4-odd": "ort", "hyena-mixed": "onnx"}
CASES = [pytest.param(n, QUICK[n]) for n in QUICK]
CASES += [pytest.param(n, f, marks=pytest.mark.slow) for n in KERNEL for f in ("onnx", "ort") if QUICK.get(n) != f]


def made(name: str, folder: Path, flavour: str = "onnx", target: str = "host") -> Path:
    """The bundle; its export lies beside it."""
    source = random_source(f"odd {name}", family_of_config(ODD[name]), ODD[name])
    export(source, folder / "export", flavour=flavour, chunks=(5,), context=60)
    return edgeseq.compile(folder / "export", target, folder / "bundle")


@pytest.mark.parametrize(("name", "flavour"), CASES)
def test_every_stage_agrees(name: str, flavour: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = edgeseq.verify(made(name, tmp_path, flavour), export=tmp_path / "export", threads=2)
    assert report.ok, report.failed
    capfd.readouterr()
    assert cli.run(["inspect", str(tmp_path / "bundle"), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    growing = [s["bytes"] for s in facts["state"] if s["update"] == "append"]
    if not growing:
        assert facts["ledger"]["state_bytes_rw"] == 2 * sum(slot["bytes"] for slot in facts["state"])
    assert any(k["name"].startswith(KERNEL[name]) for k in facts["kernels"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
@pytest.mark.parametrize("name", KERNEL)
def test_aarch64_agrees(name: str, tmp_path: Path) -> None:
    report = edgeseq.verify(made(name, tmp_path, target="qemu-aarch64"), device="qemu-aarch64")
    assert report.ok, report.failed
