"""`edgeseq export` and `edgeseq twin` at the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgeseq.cli import run
from edgeseq.manifest import load_manifest


def test_export_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny"
    assert run(["export", "zoo:tiny-mamba", "-o", str(out), "--chunk", "4", "--flavour", "ort", "--dtype", "fp16"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    manifest = load_manifest(out)
    assert (manifest.flavour, manifest.dtype, manifest.tokenizer) == ("ort", "float16", "bytes")
    assert [g.file for g in manifest.graphs] == ["step.onnx", "chunk4.onnx"]
    assert run(["inspect", str(out)]) == 0
    assert "SelectiveScan" in capsys.readouterr().out


def test_twin_is_a_transformer_of_the_same_size(tmp_path: Path) -> None:
    module = tmp_path / "model.py"
    module.write_text(
        "from edgeseq.models.mamba import Mamba, MambaConfig\n"
        "def make():\n    return Mamba(MambaConfig(61, 32, 4, 64, d_state=4, dt_rank=2))\n"
    )
    arguments = [f"{module}:make", "-o", str(tmp_path / "twin"), "--chunk", "4", "--context", "32"]
    assert run(["twin", *arguments]) == 0
    manifest = load_manifest(tmp_path / "twin")
    assert (manifest.family, manifest.context, manifest.vocab_size) == ("transformer", 32, 61)


@pytest.mark.parametrize(
    "arguments",
    [
        ["zoo:no-such-model"],
        ["missing"],
        ["zoo:tiny-mamba", "--context", "0"],
        ["zoo:tiny-mamba", "--context", "many"],
        ["zoo:tiny-mamba", "--chunk", "8,x"],
        ["zoo:tiny-mamba", "--chunk", "8,8"],
        ["zoo:tiny-mamba", "--quant", "int3"],
    ],
)
def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(["export", *arguments, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("edgeseq: ") and "Traceback" not in error and error.count("\n") <= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export", "twin"])
def test_help_loads_neither_torch_nor_onnx(command: str) -> None:
    code = (
        "import sys; from edgeseq.cli import run; "
        f"assert run([{command!r}, '--help']) == 0; "
        "assert not {'torch', 'tvm', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--chunk" in result.stdout
