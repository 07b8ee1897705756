"""Experts through the whole chain: only the chosen ones are read, and the ledger counts those alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors

import edgeseq
from edgeseq.bundle.ledger import launch_traffic, ledger
from edgeseq.bundle.reader import BundleFile
from edgeseq.models.mixtral import MixtralConfig
from edgeseq.models.source import random_source
from edgeseq.models.twin import family_of_config
from exporters import export
from tests.models.support import CONFIGS


def made(config: object, folder: Path, target: str = "host", **how: object) -> Path:
    """The bundle; its export lies beside it."""
    source = random_source("experts", family_of_config(config), config)
    export(source, folder / "export", **({"chunks": (5,)} | how))  # type: ignore[arg-type]
    return edgeseq.compile(folder / "export", target, folder / "bundle")


def assert_chain(bundle: Path, **how: object) -> None:
    report = edgeseq.verify(bundle, **how)  # type: ignore[arg-type]
    assert report.ok, report.failed


CASES = [
    (name, flavour) for name in ("mixtral-odd", "mixtral-window", "expert-choice-odd") for flavour in ("onnx", "ort")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flavour"), CASES)
def test_every_stage_agrees(name: str, flavour: str, tmp_path: Path) -> None:
    bundle = made(CONFIGS[name], tmp_path, flavour=flavour)
    assert_chain(bundle, export=tmp_path / "export", threads=2)
    config = json.loads((tmp_path / "export" / "manifest.json").read_text())["config"]
    assert config.get("policy") == ("threshold" if name.startswith("expert-choice") else None)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
@pytest.mark.parametrize("name", ["mixtral-odd", "expert-choice-odd"])
def test_aarch64_agrees(name: str, tmp_path: Path) -> None:
    assert_chain(made(CONFIGS[name], tmp_path, target="qemu-aarch64"), device="qemu-aarch64")


def test_the_ledger_counts_the_chosen_experts_by_hand(tmp_path: Path) -> None:
    """Two layers of eight experts, two chosen: a token reads two of them, a chunk of three at most six."""
    d, width, experts, chosen, layers, vocabulary = 32, 16, 8, 2, 2, 48
    config = MixtralConfig(vocabulary, d, layers, 2, 2, 16, width, tie=False, n_experts=experts, top_k=chosen)
    bundle = made(config, tmp_path, chunks=(3,), context=16)
    assert_chain(bundle, export=tmp_path / "export", threads=2)
    plan = BundleFile(bundle / "model.edgeseq").plan
    expert = 4 * 3 * width * d  # gate, up and down
    attention, router, norms = 4 * 4 * d * d, 4 * 16 * d, 4 * 2 * d  # the router's 8 rows are packed as 16
    outside = 4 * (vocabulary * d + d + d)  # head, last norm, one row of the embedding
    small = ledger(plan).weight_bytes - layers * (attention + router + norms + chosen * expert) - outside
    assert 8 * 8 <= small <= 8 * 8 + 16, "the frequencies and a constant"
    stored = sum(t.nbytes for t in plan.tensors)
    assert stored - ledger(plan).weight_bytes >= layers * (experts - chosen) * expert
    for graph in plan.graphs:
        moved = [launch_traffic(plan, graph, x)["weights"] for x in graph.launches if "expert_linear" in x.kernel]
        assert sum(moved) == layers * min(experts, chosen * graph.tokens) * expert


WIDE = MixtralConfig(300, 80, 1, 2, 2, 40, 72, tie=False, n_experts=5, top_k=2, window=8)


@pytest.mark.parametrize(("quant", "flavour"), [("int8", "onnx"), pytest.param("int4", "ort", marks=pytest.mark.slow)])
def test_quantised_experts(quant: str, flavour: str, tmp_path: Path) -> None:
    """Codes of five experts, of which a token reads two; 80 and 72 inputs are 3 blocks of 32, packed in pairs."""
    bundle = made(WIDE, tmp_path, quant=quant, flavour=flavour)
    assert_chain(bundle, export=tmp_path / "export", threads=2)
    plan = BundleFile(bundle / "model.edgeseq").plan
    pair = 16 * 64 * (2 if quant == "int8" else 1) // 2 + 64  # 16 rows of two blocks of codes, and their scales
    expert = (-(-2 * 72 // 16) + 80 // 16) * 2 * pair
    moved = [launch_traffic(plan, plan.step, x)["weights"] for x in plan.step.launches if "expert_linear_q" in x.kernel]
    assert len(moved) == 2
    assert sum(moved) == 2 * expert
    with safetensors.safe_open(tmp_path / "export" / "weights.safetensors", framework="np") as file:
        names = set(file.keys())
    assert {"layers.0.moe.gate_up_proj.weight.codes", "layers.0.moe.down_proj.weight.scales"} <= names
    assert "layers.0.moe.router.weight" in names, "what chooses is not rounded"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
def test_quantised_experts_on_aarch64(tmp_path: Path) -> None:
    assert_chain(made(WIDE, tmp_path, "qemu-aarch64", quant="int8"), device="qemu-aarch64")


@pytest.mark.slow
def test_half_precision_storage_of_experts(tmp_path: Path) -> None:
    bundle = made(WIDE, tmp_path, dtype="fp16", chunks=())
    assert_chain(bundle, export=tmp_path / "export", threads=2)
    stored = {t.name: t.dtype for t in BundleFile(bundle / "model.edgeseq").plan.tensors}
    assert stored["layers.0.moe.down_proj.weight"] == "float16"
