"""`export --distill`: modes where they are good enough, exact filters elsewhere, and a file that says which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import edgeseq
import edgeseq.cli as cli
from edgeseq.errors import UsageError
from edgeseq.manifest import load_manifest
from edgeseq.models.hyena import HyenaConfig
from edgeseq.models.source import FamilySource, open_source, random_source
from edgeseq.models.twin import family_of_config
from edgeseq.verify.tolerances import tolerance
from exporters import export

CONFIG = HyenaConfig(53, 20, 2, 0, 64, filter_width=8, filter_bands=1, frequency=0.5)
FACTORY = """
from edgeseq.models.hyena import HyenaConfig
from edgeseq.models.source import random_source
from edgeseq.models.twin import family_of_config
def factory():
    config = HyenaConfig(53, 20, 2, 0, 64, filter_width=8, filter_bands=1, frequency=0.5)
    return random_source("smooth", family_of_config(config), config).build()
"""


def source() -> FamilySource:
    return random_source("smooth", family_of_config(CONFIG), CONFIG)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "export"
    export(source(), out, distill=12, distill_tolerance=0.05, chunks=(5,), context=40)
    return out


def facts(directory: Path) -> dict:
    return json.loads((directory / "distillation.json").read_text())


def test_the_state_no_longer_grows_and_the_answers_stay(distilled: Path) -> None:
    manifest = load_manifest(distilled)
    said = facts(distilled)
    assert (said["order"], said["tolerance"]) == (12, 0.05)
    assert [layer["modes"] for layer in said["layers"]] == [12, 12] == manifest.config["modal"]
    assert manifest.context == 0
    assert {slot.update for slot in manifest.step.signature.state} == {"shift", "overwrite"}
    assert [spec.name for spec in manifest.step.signature.inputs] == ["tokens"], "modes need no position"
    golden = safetensors.numpy.load_file(distilled / "golden.safetensors")
    with torch.no_grad():
        exact = source().build()(torch.from_numpy(golden["tokens"])[None])[0].numpy()
    difference = np.abs(golden["logits"] - exact).max()
    assert 0 < difference < 0.1 * np.abs(exact).max()
    names = safetensors.numpy.load_file(distilled / "weights.safetensors")
    assert not [n for n in names if ".filter." in n or "taps" in n], "neither the network nor its taps are stored"


def test_the_chain_holds_what_was_fitted(distilled: Path, tmp_path: Path) -> None:
    bundle = edgeseq.compile(distilled, "host", tmp_path / "bundle")
    report = edgeseq.verify(bundle, export=distilled, threads=1)
    assert report.ok, report.failed


def test_a_layer_above_the_tolerance_keeps_its_filters(tmp_path: Path) -> None:
    errors = [layer["error"] for layer in facts(_exported(tmp_path / "loose", 2, 0.999))["layers"]]
    out = _exported(tmp_path / "between", 2, sum(errors) / 2)
    modes = [layer["modes"] for layer in facts(out)["layers"]]
    assert sorted(modes) == [0, 2]
    assert modes.index(0) == int(np.argmax(errors))
    assert load_manifest(out).context == 40
    none = _exported(tmp_path / "none", 2, min(errors) / 2)
    assert load_manifest(none).config["modal"] == []
    straight = export(source(), tmp_path / "straight", chunks=(), context=40)
    assert load_manifest(none).model_id == straight.model_id, "nothing but the exact model"


def _exported(out: Path, order: int, tolerance: float) -> Path:
    export(source(), out, distill=order, distill_tolerance=tolerance, chunks=(), context=40)
    return out


@pytest.mark.slow
def test_live_rebuilds_the_distilled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeseq.models.source.open_source", lambda name: source())
    out = _exported(tmp_path / "export", 12, 0.5)
    report = edgeseq.verify(out, live=True, threads=1)
    assert report.ok, report.failed
    assert {"PyTorch whole sequence", "PyTorch step", "PyTorch chunks"} <= {s.name for s in report.stages}


@pytest.mark.slow
def test_a_module_of_ones_own_is_distilled_too(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(FACTORY)
    manifest = export(
        f"{tmp_path / 'model.py'}:factory", tmp_path / "out", distill=1, distill_tolerance=0.999, chunks=()
    )
    assert (manifest.config["modal"], manifest.context) == ((1, 1), 0)
    config = replace(CONFIG, modal=(1, 1))
    modal = random_source("modal", family_of_config(config), config)
    with pytest.raises(UsageError, match="distilled already"):
        export(modal, tmp_path / "again", distill=1)


def test_what_cannot_be_distilled_is_said(tmp_path: Path) -> None:
    wrong = [
        ("zoo:tiny-mamba", {"distill": 4}, "no long convolutions"),
        (source(), {"distill": 0}, "0 modes"),
        (source(), {"distill": 4, "distill_tolerance": 0.0}, "tolerance of 0.0"),
        (source(), {"distill_tolerance": 0.1}, "needs an order"),
    ]
    for what, options, message in wrong:
        with pytest.raises(UsageError, match=message):
            export(what, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_taps_beyond_the_context_are_left_out(tmp_path: Path) -> None:
    """64 taps, 40 tokens: what is stored and said is what the context can reach, and the answers are the same."""
    export(source(), tmp_path / "short", chunks=(5,), context=40)
    manifest, stored = (
        load_manifest(tmp_path / "short"),
        safetensors.numpy.load_file(tmp_path / "short/weights.safetensors"),
    )
    assert manifest.config["reach"] == 40
    assert stored["layers.1.mixer.taps0"].shape == (40, 20)
    np.testing.assert_array_equal(stored["layers.1.mixer.taps0"], source().tensor("layers.1.mixer.taps0")[:40])
    golden = safetensors.numpy.load_file(tmp_path / "short/golden.safetensors")
    with torch.no_grad():
        exact = source().build()(torch.from_numpy(golden["tokens"])[None])[0].numpy()
    assert len(exact) == 40
    assert np.abs(golden["logits"] - exact).max() <= tolerance("torch", "float32", exact)
    assert export(source(), tmp_path / "long", chunks=(), context=64).config["reach"] == 0


def test_the_command_prints_the_error_of_each_layer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = open_source
    monkeypatch.setattr(
        "edgeseq.models.source.open_source", lambda name: source() if name == "zoo:smooth" else real(name)
    )
    out = tmp_path / "export"
    arguments = ["export", "zoo:smooth", "-o", str(out), "--distill", "8", "--distill-tolerance", "0.3", "--chunk", "5"]
    assert cli.run([*arguments, "--context", "40"]) == 0
    said = capfd.readouterr().out
    assert "Filters as 8 modes, at most 30 % of error in any channel:" in said
    assert [line.split()[:3] for line in said.splitlines()[2:4]] == [["0", "8", "modes"], ["1", "8", "modes"]]
    assert cli.run([*arguments, "--context", "40"]) == 0, "an earlier distilled export is replaced"
    assert cli.run(["export", "zoo:tiny-mamba", "-o", str(out), "--distill", "4"]) == 2
    assert "zoo:tiny-mamba has no long convolutions to distil" in capfd.readouterr().err
