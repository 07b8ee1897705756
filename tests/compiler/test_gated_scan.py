"""GatedScan's kernel against the definition, FalconMamba and RecurrentGemma through the whole chain, and products in
which every head has a matrix of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import edgeseq
import edgeseq.cli as cli
from edgeseq.compiler.ir import KernelRef
from edgeseq.compiler.kernels.gated_scan import GatedScan
from edgeseq.models.source import random_source
from edgeseq.models.twin import family_of_config
from edgeseq.ops.gated_scan import gated_scan
from edgeseq.verify.tolerances import tolerance
from exporters import export
from tests.compiler.library import ON, AnyLibrary, library_on
from tests.models.support import CONFIGS

KERNELS = [GatedScan(1, 70, 70, 70), GatedScan(9, 33, 40, 35), GatedScan(5, 16, 16, 16), GatedScan(3, 3, 3, 9)]


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    return library_on(
        request.param, tmp_path_factory.mktemp("gated"), [(KernelRef("gated_scan", p), 4) for p in KERNELS]
    )


@pytest.mark.parametrize("p", KERNELS, ids=lambda p: f"t{p.T}d{p.D}")
def test_kernel_equals_the_definition(p: GatedScan, library: AnyLibrary) -> None:
    rng = np.random.default_rng(p.D)
    x, past = (rng.standard_normal(s).astype(np.float32) for s in ((p.T, p.D), (p.D,)))
    log_a = -(10.0 ** rng.uniform(-6, 2, (p.T, p.D))).astype(np.float32)
    apart = []
    for rows, ld in ((x, p.ldx), (log_a, p.ldl)):
        wide = np.full((p.T, ld), np.nan, np.float32)
        wide[:, : p.D] = rows
        apart.append(wide.reshape(-1)[: (p.T - 1) * ld + p.D].copy())
    found = library.call(KernelRef("gated_scan", p), [*apart, past, np.full((p.T, p.D), np.nan, np.float32)], "rrmw")
    wanted = gated_scan(x[None].astype(np.float64), log_a[None].astype(np.float64), past[None].astype(np.float64))
    for got, want in zip(found, (wanted[1][0], wanted[0][0]), strict=True):
        assert np.abs(got - want).max() <= tolerance("runtime", "float32", want)


def made(name: str, folder: Path, target: str = "host", **how: object) -> Path:
    """The bundle; its export lies beside it."""
    config = CONFIGS[name]
    source = random_source(f"odd {name}", family_of_config(config), config)
    export(source, folder / "export", **({"chunks": (5,)} | how))  # type: ignore[arg-type]
    return edgeseq.compile(folder / "export", target, folder / "bundle")


QUICK = [("recurrent-gemma-odd", "onnx")]
SLOW = [("recurrent-gemma-odd", "ort"), ("falcon-mamba-odd", "onnx"), ("falcon-mamba-odd", "ort")]


@pytest.mark.parametrize(("name", "flavour"), [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)])
def test_every_stage_agrees(name: str, flavour: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = edgeseq.verify(made(name, tmp_path, flavour=flavour), export=tmp_path / "export", threads=2)
    assert report.ok, report.failed
    capfd.readouterr()
    assert cli.run(["inspect", str(tmp_path / "bundle"), "--json"]) == 0
    kernels = {k["name"] for k in json.loads(capfd.readouterr().out)["kernels"]}
    if name.startswith("recurrent"):
        assert any(k.startswith("gated_scan_t1") for k in kernels)
        assert any(k.startswith("expert_linear_t1_a3_e3_m14_k14") for k in kernels), "a gate's blocks have a kernel"
    else:
        assert any(k.startswith("selective_scan_t1") for k in kernels)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
@pytest.mark.parametrize("name", ["recurrent-gemma-odd", "falcon-mamba-odd"])
def test_aarch64_agrees(name: str, tmp_path: Path) -> None:
    report = edgeseq.verify(made(name, tmp_path, target="qemu-aarch64"), device="qemu-aarch64")
    assert report.ok, report.failed
