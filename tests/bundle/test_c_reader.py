"""The two readers agree: what Python writes the C runtime runs, and what was written by hand Python reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import edgeseq
from edgeseq.bundle.reader import BundleFile
from edgeseq.bundle.writer import write_plan
from edgeseq.errors import BundleError
from runtimes import sources
from tests.bundle.plans import manifest
from tests.runtime import build, handmade, handmade_gpu


def _handmade(path: Path, parts: handmade.Parts | None = None) -> Path:
    """The runtime's hand-made model, with the META that Python wants and C ignores."""
    parts = parts or handmade.parts()
    facts = asdict(manifest((), handmade.N)) | {"model_id": parts.model_id.hex()}
    traffic = {f"chunk{t}": [{}] * graph[3] for t, graph in zip(handmade.CHUNKS, parts.graphs, strict=True)}
    parts.meta = json.dumps({"manifest": facts, "target": {}, "traffic": traffic, "meta": {}}).encode()
    path.mkdir()
    (path / "model.edgeseq").write_bytes(parts.build())
    return path


def test_python_reads_what_was_written_by_hand_and_c_runs_what_python_wrote(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    with BundleFile(_handmade(tmp_path / "theirs")) as bundle:
        assert [g.tokens for g in bundle.plan.graphs] == list(handmade.CHUNKS)
        number = write_plan(bundle.plan, ours / "model.edgeseq")
    flags = [f"-DPLAN_ID=0x{number:08x}u", "-O2", "-fPIC", "-shared"]
    build.compile_c(ours / "libmodel.so", [*sources(), build.KERNELS], flags)
    reference = handmade.Reference()
    with edgeseq.load(ours, threads=2, poison=True) as model, model.session() as session:
        model.check_weights()
        for token in (3, 1, 4, 1, 5, 9, 2, 6):
            np.testing.assert_allclose(session.step(token), reference.step(token), rtol=1e-5, atol=1e-4)


def test_python_reads_a_plan_for_a_gpu_and_writes_it_back(tmp_path: Path) -> None:
    parts = handmade_gpu.parts()
    with BundleFile(_handmade(tmp_path / "gpu", parts)) as bundle:
        plan = bundle.plan
        assert plan.backend == "opencl" and plan.step.launches[-1].block == (handmade.V, 1, 1)
        assert [e.spec.role for e in plan.step.io if e.direction == "out"] == ["logits", "next"]
        write_plan(plan, tmp_path / "model.edgeseq")
    with BundleFile(tmp_path / "model.edgeseq") as again:
        assert again.plan.graphs == plan.graphs and again.plan.kernels == plan.kernels


@pytest.mark.parametrize("where", [9, 40, 70, 500, 700])
def test_both_refuse_the_same_damage(where: int, tmp_path: Path) -> None:
    bundle = _handmade(tmp_path / "bundle")
    data = bytearray((bundle / "model.edgeseq").read_bytes())
    data[where] ^= 0xFF
    (bundle / "model.edgeseq").write_bytes(data)
    build.compile_c(
        bundle / "libmodel.so", [*sources(), build.KERNELS], [build.plan_id(), "-O0", "-fPIC", "-shared"]
    )  # fmt: skip
    with pytest.raises(BundleError):
        BundleFile(bundle)
    with pytest.raises(BundleError):
        edgeseq.load(bundle)
