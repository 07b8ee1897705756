"""Families whose state is a cache of keys and values, through the whole chain at odd sizes: PyTorch, onnxruntime, the
library, aarch64."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import edgeseq
from edgeseq.models.gpt2 import Gpt2Config
from edgeseq.models.source import random_source
from edgeseq.models.twin import family_of_config
from exporters import export
from tests.models.support import ODD

GPT2 = ODD["gpt2-odd"]
assert isinstance(GPT2, Gpt2Config)
SHAPES = {
    "gpt2": replace(GPT2, activation="gelu_tanh", tie=True),
    "gpt2-erf": GPT2,
    "transformer-yarn": ODD["transformer-yarn"],
    "longformer": ODD["longformer-odd"],
    "bigbird": ODD["bigbird-odd"],
    "gpt2-relu": replace(GPT2, activation="relu", n_layers=1),
}
QUICK = {"gpt2": "onnx", "longformer": "onnx", "bigbird": "ort"}
CASES = [pytest.param(n, QUICK[n]) for n in QUICK]
CASES += [pytest.param(n, f, marks=pytest.mark.slow) for n in SHAPES for f in ("onnx", "ort") if QUICK.get(n) != f]


def made(name: str, folder: Path, flavour: str = "onnx", target: str = "host") -> Path:
    """The bundle; its export lies beside it."""
    source = random_source(f"odd {name}", family_of_config(SHAPES[name]), SHAPES[name])
    export(source, folder / "export", flavour=flavour, chunks=(20,))
    return edgeseq.compile(folder / "export", target, folder / "bundle")


@pytest.mark.parametrize(("name", "flavour"), CASES)
def test_every_stage_agrees(name: str, flavour: str, tmp_path: Path) -> None:
    report = edgeseq.verify(made(name, tmp_path, flavour), export=tmp_path / "export", threads=2)
    assert report.ok, report.failed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
@pytest.mark.parametrize("name", QUICK)
def test_aarch64_agrees(name: str, tmp_path: Path) -> None:
    report = edgeseq.verify(made(name, tmp_path, target="qemu-aarch64"), device="qemu-aarch64")
    assert report.ok, report.failed
