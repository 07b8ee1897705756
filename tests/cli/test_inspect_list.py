"""`inspect` and `list` say what is there, for people and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import edgeseq.cli as cli
from edgeseq.bundle.directory import new_bundle
from edgeseq.bundle.ledger import ledger
from edgeseq.bundle.writer import write_plan
from edgeseq.cli.table import depth, size, table
from tests.bundle.plans import cached_plan, manifest, recurrent_plan


def _run(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = cli.run(list(arguments))
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    return out


@pytest.fixture(params=[recurrent_plan, cached_plan])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with new_bundle(tmp_path / "bundle") as directory:
        write_plan(request.param(), directory / "model.edgeseq")
    return tmp_path / "bundle"


def test_inspect_bundle_as_json(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(_run(capfd, "inspect", str(bundle), "--json", "--context", "0,1k"))
    assert facts["kind"] == "bundle"
    assert facts["launches_per_token"] == sum(k["launches"] for k in facts["kernels"])
    first, last = facts["depths"]
    assert (first["depth"], last["depth"]) == (0, 1024)
    grows = facts["context"] > 0
    assert (last["bytes_per_token"] > first["bytes_per_token"]) == grows
    assert (last["state_bytes"] > first["state_bytes"]) == grows
    assert facts["ledger"]["weight_bytes"] == 32 + 48 + 544


def test_inspect_bundle_for_people(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = _run(capfd, "inspect", str(bundle))
    for word in ("zoo:test: mamba, 136 parameters", "weights read", "kernels of the step", "memory", "session"):
        assert word in text


def test_the_bound_of_a_device_is_called_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = recurrent_plan()
    with new_bundle(tmp_path / "bundle") as directory:
        write_plan(replace(plan, target={"name": "raspberry-pi-5"}), directory / "model.edgeseq")
    facts = json.loads(_run(capfd, "inspect", str(tmp_path / "bundle"), "--json", "--context", "0"))
    assert facts["bound"]["tok_s"]["0"] == pytest.approx(17.1e9 / ledger(plan).bytes_per_token(0), rel=1e-4)
    text = _run(capfd, "inspect", str(tmp_path / "bundle"))
    assert "a bound by its 17.1 GB/s" in text and "not a measurement" in text and "LPDDR4X-4267" in text


def test_the_bound_of_a_users_own_device_comes_from_the_bundle(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = recurrent_plan()
    facts = {"name": "my-phone", "peak_bandwidth_gbs": 50.0, "bandwidth_source": "its data sheet"}
    with new_bundle(tmp_path / "bundle") as directory:
        write_plan(replace(plan, target=facts), directory / "model.edgeseq")
    text = _run(capfd, "inspect", str(tmp_path / "bundle"))
    assert "more tokens/s than this on my-phone: a bound by its 50.0 GB/s (its data sheet), not a measurement" in text
    with new_bundle(tmp_path / "bundle") as directory:
        write_plan(replace(plan, target=facts | {"peak_bandwidth_gbs": "much"}), directory / "model.edgeseq")
    assert "a bound by" not in _run(capfd, "inspect", str(tmp_path / "bundle"))


def _export(directory: Path) -> Path:
    made = manifest(recurrent_plan().manifest.step.signature.state)
    directory.mkdir()
    made.save(directory)
    nodes = [onnx.helper.make_node("Add", ["a", "a"], ["b"]), onnx.helper.make_node("Mul", ["b", "b"], ["c"])]
    nodes.append(onnx.helper.make_node("SelectiveScan", ["c"], ["d"], domain="ai.edgeseq"))
    for graph in made.graphs:
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [])), str(directory / graph.file))
    return directory


def test_inspect_export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export = _export(tmp_path / "export")
    facts = json.loads(_run(capfd, "inspect", str(export), "--json"))
    assert facts["kind"] == "export"
    assert facts["graphs"][0]["ops"] == {"Add": 1, "Mul": 1, "ai.edgeseq.SelectiveScan": 1}
    assert facts["state_bytes"] == 96 + 128
    text = _run(capfd, "inspect", str(export))
    assert "ai.edgeseq.SelectiveScan" in text and "conv.*" in text


@pytest.mark.parametrize(
    ("damage", "code", "sentence"),
    [
        (lambda e: (e / "manifest.json").unlink(), 2, "it has no manifest.json"),
        (lambda e: (e / "manifest.json").write_text("{"), 1, "is not JSON"),
        (lambda e: (e / "manifest.json").write_text('{"version": 7}'), 1, "has version 7"),
        (lambda e: (e / "step.onnx").unlink(), 1, "though manifest.json names it"),
        (lambda e: (e / "step.onnx").write_bytes(b"\xff" * 9), 1, "is not an ONNX file"),
    ],
)
def test_inspect_refuses(damage, code: int, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export = _export(tmp_path / "export")
    damage(export)
    assert cli.run(["inspect", str(export)]) == code
    out, err = capfd.readouterr()
    assert out == "" and sentence in err and "Traceback" not in err


def test_inspect_refuses_a_truncated_bundle(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = (bundle / "model.edgeseq").read_bytes()
    (bundle / "model.edgeseq").write_bytes(data[:-10])
    assert cli.run(["inspect", str(bundle)]) == 1
    assert "its header says" in capfd.readouterr().err


def test_list_devices_and_targets(capfd: pytest.CaptureFixture[str]) -> None:
    names = {d["name"] for d in json.loads(_run(capfd, "list", "devices", "--json"))}
    assert {"host", "raspberry-pi-5", "qemu-aarch64"} <= names
    assert {"host", "raspberry-pi-5"} <= {t["name"] for t in json.loads(_run(capfd, "list", "targets", "--json"))}
    assert "cortex-a76" in _run(capfd, "list", "devices")


def test_list_families_and_zoo(capfd: pytest.CaptureFixture[str]) -> None:
    families = {f["name"]: f for f in json.loads(_run(capfd, "list", "families", "--json"))}
    assert families["mamba"]["growth"] == "constant" and "mamba" in families["mamba"]["loads"]
    assert families["mamba"]["state_bytes_per_layer"] == {"L": "4 D (N + k - 1)"}
    assert families["mamba"]["ops"] == ["causal_conv", "selective_scan"] and families["mamba"]["inputs"] == "tokens"
    assert families["dnc"]["inputs"] == "named" and families["dnc"]["zoo"]
    for family in families.values():
        assert family["growth"] in ("constant", "window", "linear") and family["state_bytes_per_layer"]
    told = _run(capfd, "list", "families")
    assert all(f["name"] in told and f["state_bytes"] in told for f in families.values())
    zoo = {z["name"]: z for z in json.loads(_run(capfd, "list", "zoo", "--json"))}
    assert zoo["zoo:mamba-130m"]["params"] == 129_135_360
    assert zoo["zoo:tiny-mamba"]["weights"] == "trained"
    assert "zoo:mamba-130m" in _run(capfd, "list", "zoo")


def test_sizes_and_tables() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, 10 << 20, 1 << 30)] == [
        "0 B", "1023 B", "1.00 KiB", "1.50 KiB", "10.0 MiB", "1.00 GiB",
    ]  # fmt: skip
    assert [depth(n) for n in (0, 100, 1024, 8192, 1 << 20)] == ["0", "100", "1k", "8k", "1M"]
    assert table([("a", 1), ("bcd", 22)], ("name", "n")) == "  name   n\n  a      1\n  bcd   22"
