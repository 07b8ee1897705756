"""Families with a matrix state through the whole chain at odd sizes: PyTorch, onnxruntime, the library, aarch64.

Also what the compiler is meant to see: repeated keys are read where they are, and the state costs one read and one
write a token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import edgeseq
import edgeseq.cli as cli
from edgeseq.bundle.reader import BundleFile
from edgeseq.models.gla import GLAConfig
from edgeseq.models.mamba2 import Mamba2Config
from edgeseq.models.source import random_source
from edgeseq.models.twin import family_of_config
from exporters import export
from tests.every import rotated
from tests.models.test_matrix_state import ODD

QUICK = {"mamba2-groups": "onnx", "gated-delta-net": "ort"}
CASES = [pytest.param(n, QUICK[n]) for n in QUICK]
CASES += [
    pytest.param(n, f, marks=pytest.mark.slow)
    for i, n in enumerate(ODD)
    for f in rotated(i, ("onnx", "ort"))
    if QUICK.get(n) != f
]


def made(name: str, folder: Path, flavour: str = "onnx", target: str = "host") -> Path:
    """The bundle; its export lies beside it."""
    source = random_source(f"odd {name}", family_of_config(ODD[name]), ODD[name])
    export(source, folder / "export", flavour=flavour, chunks=(5,))
    return edgeseq.compile(folder / "export", target, folder / "bundle")


@pytest.mark.parametrize(("name", "flavour"), CASES)
def test_every_stage_agrees(name: str, flavour: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = edgeseq.verify(made(name, tmp_path, flavour), export=tmp_path / "export", threads=2)
    assert report.ok, report.failed
    capfd.readouterr()
    assert cli.run(["inspect", str(tmp_path / "bundle"), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["ledger"]["state_bytes_rw"] == 2 * sum(slot["bytes"] for slot in facts["state"])
    kernels = [k["name"] for k in facts["kernels"] if k["name"].startswith("linear_attention")]
    assert len(kernels) == 1
    if name == "mamba2-groups":
        assert "hq3_hk3" in kernels[0], "B and C were repeated for every head"


@pytest.mark.parametrize("flavour", ["onnx", pytest.param("ort", marks=pytest.mark.slow)])
def test_grouped_queries_and_shared_keys_under_every_rule(flavour: str, tmp_path: Path) -> None:
    export(f"{Path(__file__).parent / 'grouped_heads.py'}:factory", tmp_path / "export", flavour=flavour, chunks=(7,))
    bundle = edgeseq.compile(tmp_path / "export", "host", tmp_path / "bundle")
    report = edgeseq.verify(bundle, export=tmp_path / "export", threads=2)
    assert report.ok, report.failed


@pytest.mark.slow
@pytest.mark.parametrize("config", [Mamba2Config(61, 40, 2, 8, 10, 16), GLAConfig(61, 32, 2, 2, 24, 128, 40)])
def test_long_prompts_are_matrix_products(config: object, tmp_path: Path) -> None:
    """The golden's 48 tokens are a chunk of 33 and steps."""
    family = family_of_config(config)
    export(random_source("long", family, config), tmp_path / "export", chunks=(33,))
    bundle = edgeseq.compile(tmp_path / "export", "host", tmp_path / "bundle")
    report = edgeseq.verify(bundle, export=tmp_path / "export", threads=2)
    assert report.ok, report.failed
    with BundleFile(bundle) as file:
        assert any(k.name.startswith("linear_attention_chunk") for k in file.plan.kernels)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
@pytest.mark.parametrize("name", ["mamba2-groups", "gated-delta-net", "linear-transformer"])
def test_aarch64_agrees(name: str, tmp_path: Path) -> None:
    report = edgeseq.verify(made(name, tmp_path, target="qemu-aarch64"), device="qemu-aarch64")
    assert report.ok, report.failed
