"""What users get wrong, from the command line: one sentence with the value, the right exit code, nothing left."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import edgeseq.cli as cli

MAMBA = {"model_type": "mamba", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}


def _config(directory: Path, **changes: object) -> None:
    (directory / "config.json").write_text(json.dumps({**MAMBA, **changes}))


def _pickle(directory: Path) -> None:
    _config(directory)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": [1.0]}))


def _truncated_weights(directory: Path) -> None:
    _config(directory)
    (directory / "model.safetensors").write_bytes(b"\xff" * 16)


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no config": (lambda d: None, 2, "config.json"),
    "a config that is not JSON": (lambda d: (d / "config.json").write_text("{"), 1, "config.json"),
    "an unknown model type": (lambda d: _config(d, model_type="bert"), 1, "bert"),
    "a contradictory size": (lambda d: _config(d, hidden_size=-16), 1, "hidden_size"),
    "a pickle": (_pickle, 1, "safetensors"),
    "no weights": (_config, 1, "safetensors"),
    "damaged weights": (_truncated_weights, 1, "model.safetensors"),
}


def _refused(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str) -> None:
    assert cli.run(arguments) == code
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and words in err
    assert lines[0].startswith("edgeseq: ") and "defect" not in err and "Traceback" not in err
    assert len(lines) <= 2


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, code, words = CHECKPOINTS[name]
    source = tmp_path / "source"
    source.mkdir()
    make(source)
    _refused(capfd, ["export", str(source), "-o", str(tmp_path / "out")], code, words)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 2, "nowhere does not exist"),
        (["zoo:mamba-13b"], 2, "mamba-13b"),
        (["zoo:tiny-mamba", "--context", "0"], 2, "context"),
        (["zoo:tiny-mamba", "--context", "-5"], 2, "context"),
        (["zoo:tiny-mamba", "--context", "99999999999"], 2, "context"),
        (["zoo:tiny-mamba", "--context", "many"], 2, "--context"),
        (["zoo:tiny-mamba", "--chunk", "0"], 2, "chunk"),
        (["zoo:tiny-mamba", "--flavour", "vanilla"], 2, "--flavour"),
    ],
)
def test_export(arguments: list[str], code: int, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _refused(capfd, ["export", *arguments, "-o", str(tmp_path / "out")], code, words)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_ones_own_is_not_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").write_text("years of work")
    _refused(capfd, ["export", "zoo:tiny-mamba", "-o", str(tmp_path)], 2, "not overwritten")
    assert (tmp_path / "thesis").read_text() == "years of work"


@pytest.mark.parametrize("command", ["compile", "inspect", "verify"])
def test_a_missing_directory(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--target", "host", "-o", str(tmp_path / "out")] if command == "compile" else []
    _refused(capfd, [command, str(tmp_path / "missing"), *more], 2, "missing")
    assert list(tmp_path.iterdir()) == []
