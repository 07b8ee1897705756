"""The chain holds for real bundles of every family, and breaks where one byte of it is wrong."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgeseq
import edgeseq.cli as cli
from edgeseq.bundle.reader import BundleFile
from edgeseq.errors import BundleError, DeviceError, UsageError
from edgeseq.verify.chain import verify
from tests import bundles

FORMS = {"weights", "runtime step", "runtime prefill", "runtime chunk4 graph", "runtime chunk16 graph"}
STATE = {"runtime state loaded", "runtime state forked", "runtime state reset"}
CHOICES = {"runtime greedy tokens", "runtime generate"}


@pytest.mark.parametrize("name", list(bundles.CONFIGS))
def test_every_stage_passes(name: str) -> None:
    report = verify(bundles.bundled(name), export=bundles.exported(name))
    assert report.ok, report.failed
    stages = {stage.name: stage for stage in report.stages}
    assert FORMS | STATE | CHOICES <= set(stages)
    assert {"bundle", "onnxruntime step", "onnxruntime chunks", "onnxruntime chunk16 graph"} <= set(stages)
    assert all(stages[n].worst == 0 == stages[n].tolerance for n in STATE)
    assert 0 < (stages["runtime step"].worst or 0) < (stages["runtime step"].tolerance or 0)


def test_a_model_of_named_inputs() -> None:
    report = verify(bundles.bundled("filter"), export=bundles.exported("filter"))
    assert report.ok, report.failed
    assert [s.name for s in report.stages].count("runtime step") == 1


def test_an_export_by_itself() -> None:
    assert verify(bundles.exported("mamba")).ok
    with pytest.raises(UsageError, match="cannot be built again"):
        verify(bundles.exported("mamba"), live=True)


@pytest.mark.slow
def test_a_source_built_again(tmp_path: Path) -> None:
    edgeseq.export("zoo:tiny-mamba", tmp_path / "export")
    names = [stage.name for stage in verify(tmp_path / "export", live=True).stages]
    assert names[:3] == ["PyTorch whole sequence", "PyTorch step", "PyTorch chunks"]


def test_the_module_can_be_called() -> None:
    """Importing anything from edgeseq.verify makes that name the module, which then stands in for the function."""
    module = import_module("edgeseq.verify")
    assert module(bundles.exported("mamba")).kind == "export"
    assert edgeseq.verify(bundles.exported("mamba")).ok


def flip(path: Path, at: int) -> None:
    """Flip the highest bit of a byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x80
    path.write_bytes(data)


def test_a_flipped_weight_byte_fails(mamba: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with BundleFile(mamba) as bundle:
        start = bundle._weights.offset
    flip(mamba / "model.edgeseq", start + 3)  # sign and exponent of the first weight
    assert cli.run(["verify", str(mamba)]) == 1
    out, err = capfd.readouterr()
    assert "FAILED" in out and "weights" in err and "Traceback" not in err


def test_the_numbers_alone_catch_a_wrong_weight(mamba: Path) -> None:
    """The checksum aside: one weight with another sign changes the logits."""
    with BundleFile(mamba) as bundle:
        tensor = max(bundle.plan.tensors, key=lambda t: t.nbytes)
        start = bundle._weights.offset
    raw = (mamba / "model.edgeseq").read_bytes()
    values = np.frombuffer(raw[start : start + tensor.nbytes // 4 * 4], "<f4")
    flip(mamba / "model.edgeseq", start + 4 * int(np.argmax(np.abs(values))) + 3)
    failed = verify(mamba).failed
    assert "weights" in failed and "runtime step" in failed and "runtime prefill" in failed


def change_golden(directory: Path, **tensors: np.ndarray) -> None:
    path = directory / "golden.safetensors"
    save_file(load_file(path) | tensors, path)


def test_an_altered_golden_fails(mamba: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logits = load_file(mamba / "golden.safetensors")["logits"]
    logits[17, 5] += 0.01
    change_golden(mamba, logits=logits)
    assert cli.run(["verify", str(mamba), "--json"]) == 1
    report = json.loads(capfd.readouterr().out)
    step = next(stage for stage in report["stages"] if stage["name"] == "runtime step")
    assert not step["ok"] and step["where"] == "token 17, logit 5" and step["worst"] == pytest.approx(0.01, rel=0.01)
    assert report["ok"] is False


def test_good_is_exit_code_0(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(bundles.bundled("mamba")), "--json", "-t", "1"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["ok"] is True and err == ""


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"tokens": np.array([0, 61], np.int64)}, "logits are float32"),
        ({"tokens": np.full(48, 61, np.int64)}, "not in the vocabulary"),
        ({"tokens": np.zeros(48, np.int32)}, "expected int64"),
        ({"logits": np.full((48, 61), np.nan, np.float32)}, "not finite"),
        ({"logits": np.zeros((48, 60), np.float32)}, r"expected float32 \[48, 61\]"),
    ],
)
def test_a_malformed_golden_is_refused(mamba: Path, change: dict[str, np.ndarray], sentence: str) -> None:
    change_golden(mamba, **change)
    with pytest.raises(BundleError, match=sentence):
        verify(mamba)


def test_a_golden_that_is_no_file_of_its_kind(mamba: Path) -> None:
    (mamba / "golden.safetensors").write_bytes(b"\x80\x04junk" * 20)
    with pytest.raises(BundleError, match="not a safetensors file"):
        verify(mamba)
    (mamba / "golden.safetensors").unlink()
    with pytest.raises(UsageError, match="nothing to compare with"):
        verify(mamba)


def test_another_models_export_fails_before_it_is_compared() -> None:
    report = verify(bundles.bundled("mamba"), export=bundles.exported("transformer"))
    assert report.failed == ("bundle",) and len(report.stages) == 1


@pytest.mark.parametrize(
    "options, sentence",
    [({"device": "host"}, "not a bundle"), ({"export": "x"}, "not a bundle")],
)
def test_options_that_go_with_a_bundle(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        verify(bundles.exported("mamba"), **options)


def test_live_needs_an_export() -> None:
    with pytest.raises(UsageError, match="--live needs the export"):
        verify(bundles.bundled("mamba"), live=True)


def test_nothing_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(tmp_path)]) == 2
    assert "hint: " in capfd.readouterr().err


def test_the_driver_on_a_device(mamba: Path) -> None:
    report = verify(mamba, device="host")
    assert report.ok, report.failed
    names = [stage.name.removeprefix("host ") for stage in report.stages]
    wanted = ["model", "weights", "step", "prefill", "chunk4 graph", "chunk16 graph", "state resumed", "greedy tokens"]
    assert names == wanted and report.device == "host"
    logits = load_file(mamba / "golden.safetensors")["logits"]
    logits[3, 1] -= 1.0
    change_golden(mamba, logits=logits)
    assert "host step" in verify(mamba, device="host").failed


@pytest.mark.slow
def test_a_foreign_architecture_under_emulation() -> None:
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("qemu-user-static is not installed")
    assert verify(bundles.bundled("transformer", "raspberry-pi-5"), device="qemu-aarch64").ok
    with pytest.raises(DeviceError):
        verify(bundles.bundled("transformer"), device="qemu-aarch64")
