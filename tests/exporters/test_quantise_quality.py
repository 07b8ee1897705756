"""What rounding costs the trained models: the page says what the script measures, and neither drifts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeseq.models import families
from edgeseq.models.source import ZOO_WEIGHTS, open_source
from edgeseq.models.train import bits_per_byte
from edgeseq.verify.chain import verify
from exporters import export, golden
from tests.every import EVERY, rotated

ROOT = Path(__file__).parents[2]
TRAINED = [name for name in families() if (ZOO_WEIGHTS / f"tiny-{name}.safetensors").is_file()]
SAMPLE = (ZOO_WEIGHTS / "held-out.txt").read_bytes()
COSTS = {"int8": 0.001, "int4": 0.025}
"""Bits per byte that rounding may cost."""
MORE = {("linear-transformer", "int8"): 0.0015, ("recurrent-gemma", "int4"): 0.03}
"""What it may cost where the page's table shows that it costs more."""


def page_rows() -> dict[tuple[str, str], list[str]]:
    """(model, matrices) -> cells of the page's first tables."""
    rows: dict[tuple[str, str], list[str]] = {}
    for line in (ROOT / "docs" / "quantisation.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[0].startswith("zoo:"):
            rows[cells[0], cells[1]] = cells
    return rows


def summary_rows() -> dict[str, dict[str, float]]:
    """model -> matrices -> bits per byte in the runtime, of the page's table of all trained models."""
    rows: dict[str, dict[str, float]] = {}
    for line in (ROOT / "docs" / "quantisation.md").read_text().splitlines():
        model, *cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if model.startswith("zoo:tiny-") and len(cells) == 5:
            rows[model] = dict(zip(("fp32", "fp16", "bf16", "int8", "int4"), map(float, cells), strict=True))
    return rows


def stored_bits(name: str, folder: Path) -> float:
    model = open_source(name).build("meta").eval()
    golden.load(model, folder / "weights.safetensors")
    return bits_per_byte(model, SAMPLE, 256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "quant"),
    [(f, quant) for i, f in enumerate(TRAINED) if EVERY or i % 3 == 0 for quant in rotated(i, [*COSTS])],
)
def test_rounding_costs_little(family: str, quant: str, tmp_path: Path) -> None:
    name = f"zoo:tiny-{family}"
    export(name, tmp_path / "export", quant=quant, chunks=(), context=256)
    exact = bits_per_byte(open_source(name).build("cpu").eval(), SAMPLE, 256)
    rounded = stored_bits(name, tmp_path / "export")
    assert verify(tmp_path / "export", live=True).ok, "PyTorch built again takes the weights as stored"
    assert rounded - exact < MORE.get((family, quant), COSTS[quant])
    assert rounded == pytest.approx(summary_rows()[name][quant], abs=0.003)
    row = page_rows().get((name, quant))
    if row is not None:
        assert rounded == pytest.approx(float(row[3]), abs=0.003)


@pytest.mark.slow
def test_the_script_makes_the_rows() -> None:
    """On a short sample: PyTorch and onnxruntime agree, the runtime is near, the int8 file is a third of the size."""
    command = [sys.executable, str(ROOT / "scripts" / "quality.py"), "zoo:tiny-retnet", "--tokens", "512"]
    done = subprocess.run([*command, "--formats", "int8"], capture_output=True, text=True, cwd=ROOT, check=True)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["fp32", "int8"]
    for row in rows:
        with_torch, with_ort, here = map(float, row[3:6])
        assert with_ort == pytest.approx(with_torch, abs=2e-4) and here == pytest.approx(with_torch, abs=0.02)
    assert float(rows[0][6]) == 0 < float(rows[1][6]) < 0.01
    assert int(rows[1][2]) < 0.35 * int(rows[0][2])


def test_the_page_has_every_format_of_every_model_it_names() -> None:
    rows = page_rows()
    models = {model for model, _ in rows if model.startswith("zoo:tiny-")}
    assert {f"zoo:tiny-{f}" for f in ("mamba", "retnet", "transformer")} <= models
    for model in models:
        exact = float(rows[model, "fp32"][3])
        for matrices in ("fp16", "bf16", "int8", "int4", "int4 uncalibrated"):
            assert -0.002 < float(rows[model, matrices][5]) - exact < 0.04


def test_the_page_sums_up_every_trained_model() -> None:
    rows = summary_rows()
    assert set(rows) == {f"zoo:tiny-{family}" for family in TRAINED}
    for family in TRAINED:
        bits = rows[f"zoo:tiny-{family}"]
        recorded = json.loads((ZOO_WEIGHTS / f"tiny-{family}.json").read_text())["sample_bits_per_byte"]
        assert bits["fp32"] == pytest.approx(recorded, abs=1e-3)
        most = MORE.get((family, "int4"), COSTS["int4"])
        assert all(-0.002 < bits[matrices] - bits["fp32"] < most for matrices in bits)
