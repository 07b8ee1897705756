"""A wrong request or a model that cannot be exported: one sentence, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeseq.errors import ExportError, UsageError
from exporters import export, golden
from tests.exporters.support import source

MODELS = Path(__file__).parent / "user_models.py"


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flavour": "tensorrt"}, "unknown flavour 'tensorrt'"),
        ({"quant": "int3"}, "unknown quant 'int3'"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"context": 0}, "context of 0"),
        ({"context": -3}, "context of -3"),
        ({"context": 1 << 40}, "context of"),
        ({"chunks": (8, 8)}, "repeat"),
        ({"chunks": (1,)}, "chunk of 1"),
        ({"chunks": (0, 8)}, "chunk of 0"),
        ({"chunks": (99999,)}, "chunk of 99999"),
        ({"chunks": (64,), "context": 32}, "exceeds the context of 32"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        export(source("transformer"), tmp_path / "out", **options)
    assert caught.value.exit_code == 2
    assert entries(tmp_path) == []


def test_chunks_of_a_model_that_only_steps(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="steps only"):
        export(f"{MODELS}:sensor", tmp_path / "out", chunks=(8,))


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("branching", {}, "cannot be traced"),
        ("exploding", {"dtype": "fp16", "chunks": (2,)}, "weight embed.weight reaches .* float16 cannot hold"),
        ("exploding", {"chunks": (2,)}, "not finite"),
    ],
)
def test_models_that_cannot_be_exported(tmp_path: Path, model: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        export(f"{MODELS}:{model}", tmp_path / "deep" / "out", **options)
    assert entries(tmp_path) == [], "not even the parent directory that was made on the way"


def test_interrupt_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export(source("retnet"), out, chunks=())
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(golden, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(source("mamba"), out, chunks=())
    assert entries(tmp_path) == sorted(["out", *before])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    export(source("mamba"), out, chunks=())  # a whole export replaces it
    assert (out / "step.onnx").read_bytes() != before["step.onnx"]
    assert entries(tmp_path) == sorted(["out", *before])


def test_a_directory_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(source("retnet"), out, chunks=())
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not"):
        export(source("retnet"), out, chunks=())
    assert (out / "thesis.tex").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError):
        export(source("retnet"), file, chunks=())
    assert file.read_text() == "x"


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    broken = source("mamba")
    read = broken.tensor
    broken.tensor = lambda name: np.zeros(3, np.float32) if name == "norm" else read(name)  # type: ignore[method-assign]
    with pytest.raises(ExportError, match=r"weight norm has shape \(3,\)"):
        export(broken, tmp_path / "out", chunks=())
    assert entries(tmp_path) == []
