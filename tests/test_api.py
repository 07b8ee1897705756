"""`import edgeseq` is light, and what it offers is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edgeseq


def test_import_is_light() -> None:
    code = "import sys, edgeseq; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "tvm", "numpy", "onnx", "click", "rich") if f"'{name}'" in loaded]


@pytest.mark.parametrize("name", edgeseq.__all__)
def test_everything_offered_is_there(name: str) -> None:
    assert name in dir(edgeseq)
    assert getattr(edgeseq, name) is not None


@pytest.mark.parametrize("name", ["export", "compile", "verify", "load"])
def test_functions_can_be_called_whatever_was_imported_before(name: str) -> None:
    code = f"import edgeseq.verify, edgeseq.compiler, exporters, edgeseq; assert callable(edgeseq.{name})"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'edgeseq' has no attribute 'exprot'"):
        _ = edgeseq.exprot
