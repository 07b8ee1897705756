"""LSTM, GRU and RNN: the nodes they become say what onnxruntime's own kernels say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeseq.errors import CompileError

from .recurrent_cases import CASES, layer
from .support import Stream, compare


@pytest.mark.parametrize("name", CASES)
def test_as_onnxruntime_says(name: str, tmp_path: Path) -> None:
    imported = CASES[name].read(tmp_path)
    ops = {n.op_type for n in imported.model.graph.node}
    assert not ops & {"LSTM", "GRU", "RNN"} and "MatMul" in ops
    compare(CASES[name], imported)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_batch_first_is_batch_last_transposed(kind: str, tmp_path: Path) -> None:
    """onnxruntime has no layout=1; ours must be layout=0 with its axes moved."""
    rng = np.random.default_rng(0)
    first, last = (layer(kind, T=3, B=2, direction="bidirectional", layout=n).read(tmp_path) for n in (1, 0))
    names = ["h", "c"] if kind == "LSTM" else ["h"]
    pairs = {f"past.{n}": f"present.{n}" for n in names}
    ours, theirs = Stream(first.model, pairs), Stream(last.model, pairs)
    x = rng.standard_normal((3, 2, 5)).astype(np.float32)
    theirs.state = {f"past.{n}": rng.standard_normal((2, 2, 7)).astype(np.float32) for n in names}
    ours.state = {n: v.transpose(1, 0, 2) for n, v in theirs.state.items()}
    got, want = ours.run({"x": np.ascontiguousarray(x.transpose(1, 0, 2))}), theirs.run({"x": x})
    np.testing.assert_allclose(got["y"], want["y"].transpose(2, 0, 1, 3), atol=1e-6)
    for name in names:
        np.testing.assert_allclose(got[f"present.{name}"], want[f"present.{name}"].transpose(1, 0, 2), atol=1e-6)


def test_long_sequences_and_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="513 time steps are too many"):
        layer("GRU", T=513).read(tmp_path)
    shorter = layer("LSTM", T=3, lengths=True)
    lengths = next(t for t in shorter.model.graph.initializer if t.name == "lengths")
    lengths.raw_data = np.array([2], np.int32).tobytes()
    with pytest.raises(CompileError, match="sequence_lens"):
        shorter.read(tmp_path)
