"""Sliding-window attention through the whole chain: PyTorch, onnxruntime, the library, aarch64; memory that stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import edgeseq
import edgeseq.cli as cli
from edgeseq.compiler.graph import load_graph
from edgeseq.compiler.lowering import Lowering, Memory
from edgeseq.compiler.rules import rules_by_op
from edgeseq.compiler.targets import resolve
from edgeseq.models import family
from edgeseq.models.mistral import MistralConfig
from edgeseq.models.source import Source, random_source
from edgeseq.spec import Manifest
from edgeseq.verify.tolerances import tolerance
from exporters import export

CHUNKS = (5, 20)  # within the window, and beyond it


def source(window: int) -> Source:
    return random_source("odd mistral", family("mistral"), MistralConfig(61, 30, 2, 9, 3, 10, 36, window=window))


def made(window: int, folder: Path, target: str = "host", flavour: str = "onnx") -> Path:
    """The bundle; its export lies beside it."""
    manifest = export(source(window), folder / "export", flavour=flavour, chunks=CHUNKS)
    assert manifest.context == 0
    return edgeseq.compile(folder / "export", target, folder / "bundle")


@pytest.mark.parametrize("window", [11, *(pytest.param(w, marks=pytest.mark.slow) for w in (1, 70))])
def test_every_stage_agrees(window: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = made(window, tmp_path)
    report = edgeseq.verify(bundle, export=tmp_path / "export", threads=2)
    assert report.ok, report.failed
    capfd.readouterr()
    assert cli.run(["inspect", str(bundle), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert sum(slot["bytes"] for slot in facts["state"]) == 8 * 2 * 3 * 10 * window
    assert {slot["update"] for slot in facts["state"]} == {"ring"}
    assert len([k for k in facts["kernels"] if k["name"].startswith("cached_attention")]) == 1
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 61, (1, 120)))
    with torch.no_grad():
        whole = source(window).build()(tokens)[0].numpy()
    with edgeseq.load(bundle, threads=1) as model, model.session() as session:
        session.prefill(tokens[0, :83].tolist())
        for t in range(83, 120):
            assert np.abs(session.step(int(tokens[0, t])) - whole[t]).max() <= tolerance("runtime", "float32", whole[t])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    one = MistralConfig(61, 12, 1, 2, 1, 6, 8, window=11)
    export(random_source("one layer", family("mistral"), one), folder, chunks=(5,))
    return folder


@pytest.mark.parametrize("wrong", ["window", "row", "none"])
def test_only_the_window_itself_becomes_a_ring(wrong: str, exported: Path) -> None:
    """A graph that masks or writes otherwise is not claimed by the rule."""
    model = onnx.load(exported / "chunk5.onnx", load_external_data=False)
    scatter = next(n for n in model.graph.node if n.op_type == "TensorScatter")
    row = next(n for n in model.graph.node if scatter.input[2] in n.output)
    if wrong == "row":
        assert row.op_type == "Mod"
        row.op_type = "Add"
    elif wrong == "window":
        next(n for n in model.graph.node if n.op_type == "GreaterOrEqual").op_type = "Greater"
    path = exported / f"{wrong}.onnx"
    onnx.save(model, path)
    signature = next(g.signature for g in Manifest.load(exported).graphs if g.signature.tokens == 5)
    low = Lowering(load_graph(path), signature, Memory(), resolve("host"))
    node = next(n for n in low.graph.nodes if n.op == "Attention")
    claims = [rule.match(low, node) for rule in rules_by_op()["Attention"]]
    assert any(claims) == (wrong == "none")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
def test_aarch64_agrees(tmp_path: Path) -> None:
    report = edgeseq.verify(made(11, tmp_path, target="qemu-aarch64"), device="qemu-aarch64")
    assert report.ok, report.failed
