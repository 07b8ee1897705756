"""`edgeseq compile MODEL.onnx` as users type it, and the page that tells them how."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from safetensors.numpy import load_file

import edgeseq
from edgeseq.cli import run
from edgeseq.compiler import ImportOptions, compile_onnx
from edgeseq.compiler.foreign import import_onnx
from edgeseq.errors import UsageError
from edgeseq.manifest import load_manifest
from edgeseq.verify import verify
from exporters import export
from tests.bundles import exported

from .recurrent_cases import CASES
from .support import Stream, model_of, value
from .test_options import filters

PAGE = Path(__file__).parents[2] / "docs" / "bring-your-own.md"


def theirs(folder: Path) -> Path:
    return filters().write(folder)


def test_a_file_becomes_a_bundle_that_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    arguments = ["--state", "s:sn", "--dim", "batch=1", "--value", "rate=3", "--target", "host", "-o", str(out)]
    assert run(["compile", str(theirs(tmp_path)), *arguments, "--dump", str(tmp_path / "dump")]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert onnx.load(str(tmp_path / "dump" / "0-imported.onnx")).graph.input[0].name == "x"
    assert run(["inspect", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["source"], facts["vocab_size"]) == ("onnx", "theirs.onnx", 0)
    assert run(["verify", str(out), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert any(s["name"] == "runtime step" and s["against"] == "onnxruntime step" and s["ok"] for s in stages)
    with edgeseq.load(out) as model, model.session() as session:
        x = np.float32([[1, 2, 3, 4]])
        assert session.run({"x": x})["y"].tolist() == [[3, 6, 9, 12]]
        assert session.run({"x": x})["y"].tolist() == [[4.5, 9, 13.5, 18]]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--state", "s:sn"], "axis 0 of input 'x' has no size"),
        (["--state", "s:zz", "--dim", "batch=1"], "the output 'zz', which the file does not have"),
        (["--state", "s:sn", "--dim", "batch=0"], "'0' is not a size for 'batch'"),
        (["--state", "s:sn", "--shape", "x=1,wide"], "'wide' is not a size for 'x'"),
        (["--state", "s:sn", "--dim", "batch"], "'batch' is not NAME=VALUE"),
        (["--state", "s:sn", "--value", "=3"], "'=3' is not NAME=VALUE"),
    ],
)
def test_wrong_use_is_one_sentence(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert run(["compile", str(theirs(tmp_path)), *options, "--target", "host", "-o", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert sentence in said[0] and len(said) == 2 and said[1].startswith("hint: ")
    assert not out.exists()


def test_options_for_files_do_not_go_with_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", str(tmp_path), "--state", "a:b", "--target", "host", "-o", str(tmp_path / "b")]) == 2
    assert "--state is for ONNX files" in capsys.readouterr().err


def test_the_golden_is_what_the_file_itself_says(tmp_path: Path) -> None:
    """A golden that our own import had made would agree with any mistake of it."""
    case = CASES["lstm"]
    bundle = compile_onnx(case.write(tmp_path), "host", tmp_path / "bundle", ImportOptions((case.states,)))
    golden = load_file(bundle / "golden.safetensors")
    stream = Stream(case.model, {"h": "hn", "c": "cn"})
    stream.state = {n: np.zeros((1, 1, 7), np.float32) for n in ("h", "c")}
    for x, y in zip(golden["input.x"], golden["output.y"], strict=True):
        np.testing.assert_allclose(stream.run({"x": x[None]})["y"][0], y, atol=1e-7)
    assert verify(bundle).ok


def test_our_own_step_is_somebody_elses_file_too(tmp_path: Path) -> None:
    """Operators of our domain keep their kernels; weights stay in their file; every slot of the export is found."""
    directory = exported("mamba")
    slots = [s.name for s in load_manifest(directory).step.signature.state]
    options = ImportOptions(tuple(f"past.{s}:present.{s}" for s in slots))
    bundle = compile_onnx(directory / "step.onnx", "host", tmp_path / "bundle", options)
    assert verify(bundle).ok
    facts = json.loads((bundle / "bundle.json").read_text())
    assert [s["name"] for s in facts["state"]] == slots
    code = (bundle / "model.edgeseq").read_bytes()
    assert b"selective_scan_t1" in code and b"causal_conv_t1" in code


def letters(folder: Path) -> Path:
    """An Elman network over 20 letters: ids [1,1], n [1], h -> scores [1,20], hn; position shifts the scores."""
    rng = np.random.default_rng(8)
    weights = {
        "E": rng.standard_normal((20, 12)).astype(np.float32),
        "R": (0.4 * rng.standard_normal((12, 12))).astype(np.float32),
        "O": rng.standard_normal((12, 20)).astype(np.float32),
        "slow": np.float32(0.1),
    }
    nodes = [
        helper.make_node("Gather", ["E", "ids"], ["e"]),
        helper.make_node("Reshape", ["e", "row"], ["x"]),
        helper.make_node("MatMul", ["h", "R"], ["hr"]),
        helper.make_node("Add", ["hr", "x"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["hn"]),
        helper.make_node("MatMul", ["hn", "O"], ["o"]),
        helper.make_node("Cast", ["n"], ["nf"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["nf", "slow"], ["ns"]),
        helper.make_node("Add", ["o", "ns"], ["scores"]),
        helper.make_node("Neg", ["hn"], ["mood"]),
    ]
    inputs = [value("ids", [1, 1], "int64"), value("n", [1], "int64"), value("h", [1, 12])]
    outputs = [value("mood", [1, 12]), value("scores", [1, 20]), value("hn", [1, 12])]
    path = folder / "letters.onnx"
    onnx.save(model_of(nodes, inputs, outputs, weights | {"row": np.int64([1, 12])}), path)
    return path


ROLES = ["--role", "ids=tokens", "--role", "scores=logits", "--role", "n=position"]


def test_roles_make_a_token_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    file = str(letters(tmp_path))
    assert run(["compile", file, "--state", "h:hn", *ROLES, "--target", "host", "-o", str(out)]) == 0
    assert verify(out).ok
    capsys.readouterr()
    assert run(["run", str(out), "--tokens", "3,1,4", "-n", "6", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    stream = Stream(onnx.load(file), {"h": "hn"})
    stream.state = {"h": np.zeros((1, 12), np.float32)}
    ids, scores = [3, 1, 4], np.zeros(20)
    for at in range(8):
        scores = stream.run({"ids": np.int64([[ids[at]]]), "n": np.int64([at])})["scores"][0]
        if at >= 2:
            ids.append(int(np.argmax(scores)))
    assert said["tokens"] == ids[3:9]


@pytest.mark.parametrize(
    "roles, sentence",
    [
        (["ids=token"], "unknown role 'token'"),
        (["id=tokens"], "the input 'id', which the file does not have"),
        (["ids=tokens"], "has both tokens and logits"),
        (["ids=tokens", "h=tokens", "scores=logits"], "the role 'tokens' twice"),
        (["h=tokens", "scores=logits"], r"'h' is float32\[1, 12\], so it cannot be the tokens"),
    ],
)
def test_roles_that_do_not_fit(roles: list[str], sentence: str, tmp_path: Path) -> None:
    options = ImportOptions((), roles=dict(r.split("=") for r in roles))
    with pytest.raises(UsageError, match=sentence):
        import_onnx(letters(tmp_path), options)


def test_the_page_tells_the_truth(tmp_path: Path) -> None:
    """Its module is exported, compiled and verified; the options it names are those of the command."""
    text = PAGE.read_text()
    (source,) = re.findall(r"```python\n# gate.py\n(.*?)```", text, re.S)
    (tmp_path / "gate.py").write_text(source)
    export(f"{tmp_path / 'gate.py'}:factory", tmp_path / "gate")
    edgeseq.compile(tmp_path / "gate", "host", tmp_path / "gate.bundle")
    assert verify(tmp_path / "gate.bundle").ok
    with edgeseq.load(tmp_path / "gate.bundle") as model, model.session() as session:
        assert session.run({"frame": np.zeros((1, 160), np.float32)})["speech"].shape == (1, 1)
    from edgeseq.cli.cmd_compile import command

    known = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"--(?:state|shape|dim|value|role|dump|target)\b", text)) <= known
    for file in re.findall(r"\]\((\S+?\.(?:py|c|md))\)", text):
        assert (PAGE.parent / file).is_file(), file
