"""A bundle for OpenCL in the hands of a user: the same commands as for the CPU, the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgeseq.cli as cli
from edgeseq import models
from edgeseq.bundle.reader import BundleFile
from edgeseq.models.mamba import MambaConfig
from edgeseq.models.source import random_source
from exporters import export
from tests import bundles
from tests.bench.test_bench import PROFILE, check_schema, rows_of
from tests.runtime.build import opencl_missing

pytestmark = pytest.mark.skipif(bool(opencl_missing()), reason=opencl_missing() or "there")
TOKENS = [5, 9, 2, 60, 11, 30, 7, 41, 3, 3, 17, 22, 58]


def edgeseq(*arguments: object) -> int:
    return cli.run([str(a) for a in arguments])


@pytest.mark.parametrize("name", ["mamba", pytest.param("transformer", marks=pytest.mark.slow)])
def test_the_commands_work_as_on_the_cpu(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gpu, cpu = bundles.bundled(name, "opencl"), bundles.bundled(name)
    assert edgeseq("verify", gpu) == 0
    assert "runtime greedy tokens" in capfd.readouterr().out
    ids = ",".join(map(str, TOKENS))
    said = []
    for bundle in (gpu, cpu):
        assert edgeseq("run", bundle, "--tokens", ids, "-n", "24", "--json") == 0
        said.append(json.loads(capfd.readouterr().out)["tokens"])
    assert said[0] == said[1]
    out = tmp_path / "rows.jsonl"
    assert edgeseq("bench", gpu, "-p", "20", "-n", "4", "-r", "1", "--profile", "--json", out) == 0
    text = capfd.readouterr().out
    assert "OpenCL" in text and "a step is" in text
    rows = rows_of(out)
    tests, profile = rows[:2], rows[2:]
    for row in tests:
        check_schema(row)
        assert row["backends"] == "OpenCL" and row["gpu_info"].startswith("OpenCL, ") and row["read_bw_gbs"] > 0
    assert edgeseq("inspect", gpu, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert sum(r["launches"] for r in profile) == facts["launches_per_token"]
    assert all(set(r) == PROFILE and r["ns"] > 0 for r in profile)
    assert sum(r["share"] for r in profile) == pytest.approx(1)
    assert edgeseq("inspect", gpu) == 0
    assert "compiled for opencl (OpenCL on " in capfd.readouterr().out
    assert edgeseq("bench", gpu, "-p", "20", "-n", "0", "-t", "1,2") == 2
    assert "runs on a GPU, where threads do not apply" in capfd.readouterr().err


def test_a_state_saved_on_one_resumes_on_the_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundles_of = {"cpu": bundles.bundled("mamba"), "gpu": bundles.bundled("mamba", "opencl")}
    whole = ",".join(map(str, TOKENS))
    assert edgeseq("run", bundles_of["cpu"], "--tokens", whole, "-n", "20", "--json") == 0
    want = json.loads(capfd.readouterr().out)["tokens"]
    state = tmp_path / "state"
    for first, second in (("cpu", "gpu"), ("gpu", "cpu")):
        ids = ",".join(map(str, TOKENS[:7]))
        assert edgeseq("run", bundles_of[first], "--tokens", ids, "-n", "0", "--save-state", state) == 0
        capfd.readouterr()
        rest = ",".join(map(str, TOKENS[7:]))
        assert edgeseq("run", bundles_of[second], "--tokens", rest, "-n", "20", "--load-state", state, "--json") == 0
        assert json.loads(capfd.readouterr().out)["tokens"] == want, f"saved on {first}, resumed on {second}"


TENSOR_CORES = """
description = "OpenCL that computes what tensor cores do"
triple = "auto"
cpu = "auto"
[gpu]
backend = "opencl"
local_bytes = 65536
mma = true
[transport]
kind = "local"
"""


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["fp16:none", "fp32:int4"])
def test_prompts_on_tensor_cores_are_what_they_were(
    storage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Chunks go through `halves` and `mma`, steps do not; both equal PyTorch within the tolerance of all others."""
    dtype, quant = storage.split(":")
    (tmp_path / "emulated.toml").write_text(TENSOR_CORES)
    wide = MambaConfig(64, 64, 1, 128, d_state=4, dt_rank=4)  # as matrices have to be to be quantised
    source = random_source("wide", models.families()["mamba"], wide)
    export(source, tmp_path / "export", context=64, chunks=(4,), dtype=dtype, quant=quant)
    assert edgeseq("compile", tmp_path / "export", "--target", tmp_path / "emulated.toml", "-o", tmp_path / "b") == 0
    capfd.readouterr()
    assert edgeseq("verify", tmp_path / "b") == 0
    with BundleFile(tmp_path / "b") as file:
        kernels = [k.name for k in file.plan.kernels]
        assert "es_mma_" in file.plan.kernels[0].code.decode()
    assert any(name.startswith("linear_mma_t4" if quant == "none" else "linear_q_t4") for name in kernels)


def test_the_bundle_says_what_it_lacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESEQ_OPENCL_LIBRARY", "/nowhere.so")
    assert edgeseq("run", bundles.bundled("mamba", "opencl"), "--tokens", "1", "-n", "1") == 1
    error = capfd.readouterr().err
    assert "there is no OpenCL driver: /nowhere.so cannot be opened" in error and "compiled for the CPU" in error
