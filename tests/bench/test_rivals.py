"""onnxruntime on quantised exports, and torch.compile: which program really runs, and that it computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import edgeseq.models.functional as ops
from edgeseq.bench import torch_rivals
from edgeseq.bench.rivals import FAST, OrtEngine
from edgeseq.errors import EdgeseqError
from edgeseq.models import family
from edgeseq.models.mamba import MambaConfig
from edgeseq.models.source import random_source
from edgeseq.verify.golden import load_golden
from exporters import export
from exporters.ort_check import OrtModel
from tests import bundles
from tests.bench.test_bench import bench


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_onnxruntime_takes_its_fast_way_on_a_quantised_export(quant: str, tmp_path: Path) -> None:
    """Activations rounded to int8: near the golden as the runtime's rounding is, and not the float32 product."""
    model = random_source("quantised", family("mamba"), MambaConfig(256, 64, 1, 128, d_state=4, dt_rank=4))
    export(model, tmp_path / "export", quant=quant, chunks=(4,))
    rival = OrtEngine(tmp_path / "export", 1)
    assert rival.stage == "runtime" and all(stage.ok for stage in rival.verified())
    assert rival.columns["model_type"].endswith(quant)
    exact = OrtModel(tmp_path / "export", 1).session()
    golden = load_golden(tmp_path / "export", exact.model.manifest.step.signature)
    assert golden.tokens is not None
    rival.restore()
    for ids in ([3], golden.tokens[:4].tolist()):
        slow, fast = exact.prefill(ids), rival.stream.prefill(ids)
        assert np.abs(slow - fast).max() > 1e-4, "both multiplied in float32"


def test_a_float_export_is_held_to_the_exact_bound() -> None:
    assert OrtModel(bundles.exported("mamba"), 1, accuracy_level=FAST).session().prefill([1, 2]).shape == (61,)
    assert OrtEngine(bundles.exported("mamba"), 1).stage == "onnx"


def test_the_compiler_sees_into_operators_that_do_not_read_the_position() -> None:
    bodies = torch_rivals._bodies()
    assert torch.ops.edgeseq.selective_scan.default in bodies and torch.ops.edgeseq.linear_attention.default in bodies
    assert torch.ops.edgeseq.cached_attention.default not in bodies
    x = torch.randn(1, 2, 8)
    assert torch.equal(bodies[torch.ops.edgeseq.rms_norm.default](x, None, 1e-5), ops.rms_norm(x, None, 1e-5))


def test_without_a_compiler_torch_compile_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    from torch._inductor import config

    with config.patch("cpp.cxx", ("no-such-compiler",)):
        with pytest.raises(EdgeseqError, match="needs a C\\+\\+ compiler"):
            torch_rivals.check_compiler()
        against = ["--against", "torch-compile", "--export", bundles.exported("mamba")]
        assert bench(bundles.bundled("mamba"), *against, "-p", 0, "-n", 1, "-t", 1) == 1
    text, err = capfd.readouterr()
    assert text == "" and "needs a C++ compiler" in err and "install g++" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "transformer"])
def test_the_compiled_step_computes_the_same(name: str) -> None:
    try:
        torch_rivals.check_compiler()
    except EdgeseqError as error:
        pytest.skip(error.sentence)
    rival = torch_rivals.CompiledTorchEngine(bundles.exported(name), 1)
    assert all(stage.ok for stage in rival.verified())
    rival.place(20)
    rival.restore()
    assert len(rival.decode(2)) == 2 and rival.stream.position == 22
