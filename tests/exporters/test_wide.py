"""Float64 by operator is what a model converted to float64 says, and the golden carries what float32 loses."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeseq.manifest import load_manifest
from edgeseq.verify.golden import load_golden
from edgeseq.verify.tolerances import tolerance
from exporters import export
from exporters.wide import Wide
from tests.exporters.support import source
from tests.models.support import ODD, random_model

TOKENS = 21


@pytest.mark.parametrize("name", ODD)
def test_float64_by_operator_is_float64(name: str) -> None:
    model = random_model(ODD[name])
    tokens = torch.randint(0, model.config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    converted = copy.deepcopy(model).double()
    with torch.no_grad():
        want = converted(tokens)
        with Wide():
            got = model(tokens)
    assert (got.dtype, got.shape) == (torch.float64, want.shape)
    assert (got - want).abs().max() <= tolerance("torch", "float64", want)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not torch.equal(got, got.float().double())


def test_what_was_made_outside_is_not_written_to() -> None:
    outside = torch.zeros(3)
    with pytest.raises(TypeError, match="outside"), Wide():
        outside.add_(torch.ones(3))


def test_the_golden_is_of_float64_and_says_what_float32_loses(tmp_path: Path) -> None:
    model = source("mamba")
    export(model, tmp_path / "export", chunks=())
    golden = load_golden(tmp_path / "export", load_manifest(tmp_path / "export").step.signature)
    assert golden.tokens is not None and golden.logits is not None
    built = model.build()
    with torch.no_grad():
        narrow = built(torch.from_numpy(golden.tokens)[None])[0].numpy()
        wide = built.double()(torch.from_numpy(golden.tokens)[None])[0].numpy()
    np.testing.assert_array_equal(golden.logits, wide.astype(np.float32))
    lost = golden.float32["logits"]
    assert lost.largest == pytest.approx(np.abs(narrow - wide).max()) and 0 < lost.mean < lost.largest
    assert golden.bound("onnx", golden.logits) == tolerance("onnx", "float32", golden.logits) + 4 * lost.largest
