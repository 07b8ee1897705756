"""`edgeseq run` on the hand-made bundle: what it prints, what it refuses, and that a saved state resumes exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import edgeseq.cli as cli
from edgeseq.cli.text import open_text
from tests.runtime import build
from tests.runtime.handmade import N, Reference, V

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.bundle(tmp_path_factory.mktemp("run") / "bundle")


def greedy(prompt: list[int], n: int) -> list[int]:
    model, made = Reference(), []
    for token in prompt:
        logits = model.step(token)
    for _ in range(n):
        made.append(int(np.argmax(logits)))
        logits = model.step(made[-1])
    return made


def _run(capfd: pytest.CaptureFixture[str], bundle: Path, *arguments: str) -> str:
    code = cli.run(["run", str(bundle), *arguments])
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    return out


def _json(capfd: pytest.CaptureFixture[str], bundle: Path, *arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(_run(capfd, bundle, "--json", *arguments))
    return result


def _ids(ids: list[int]) -> str:
    return ",".join(map(str, ids))


def test_greedy_tokens_as_json(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = _json(capfd, bundle, "--tokens", _ids(PROMPT), "-n", "20")
    assert result["tokens"] == greedy(PROMPT, 20)
    assert result["prompt_tokens"] == len(PROMPT)
    assert result["prefill_tok_s"] > 0 and result["decode_tok_s"] > 0
    assert result["text"].encode() == bytes(result["tokens"])
    assert set(result) == {"tokens", "text", "prompt_tokens", "prefill_tok_s", "decode_tok_s"}


def test_nothing_to_make(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = _json(capfd, bundle, "--tokens", "1", "-n", "0")
    assert (result["tokens"], result["decode_tok_s"]) == ([], None)


def test_text_streams(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = _run(capfd, bundle, "--tokens", _ids(PROMPT), "-n", "5")
    assert out.encode() == bytes(greedy(PROMPT, 5)) + b"\n"


def test_seeds(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def draw(seed: int) -> list[int]:
        arguments = ("--tokens", "7", "-n", "30", "--temperature", "20", "--seed", str(seed))
        tokens: list[int] = _json(capfd, bundle, *arguments)["tokens"]
        return tokens

    assert draw(1) == draw(1) != draw(2)
    assert draw(1) != greedy([7], 30)


def test_a_saved_state_resumes_exactly(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = str(tmp_path / "state")
    _json(capfd, bundle, "--tokens", _ids(PROMPT[:6]), "-n", "0", "--save-state", state)
    result = _json(capfd, bundle, "--tokens", _ids(PROMPT[6:]), "-n", "12", "--load-state", state)
    assert result["tokens"] == greedy(PROMPT, 12)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def _words(directory: Path) -> None:
    vocab = {f"w{i}": i for i in range(V)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def test_a_tokenizer_beside_the_bundle(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "bundle"
    shutil.copytree(bundle, mine)
    _words(mine)
    prompt = " ".join(f"w{i}" for i in PROMPT)
    expected = " ".join(f"w{i}" for i in greedy(PROMPT, 30))
    assert _json(capfd, mine, "--prompt", prompt, "-n", "30")["text"] == expected
    assert _run(capfd, mine, "--prompt", prompt, "-n", "30") == expected + "\n"


def test_streaming_holds_back_half_characters(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "naïve 日本 🙂 " * 20
    for own, folder in (("bytes", tmp_path / "none"), ("none", tmp_path)):
        stream = open_text(folder, own)
        assert stream is not None
        ids = stream.encode(text)
        pieces = [stream.feed(i) for i in ids]
        assert "".join(pieces) + stream.flush() == text == stream.decode(ids)
        assert pieces.count("") > 50 and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


REFUSALS = {
    "nothing to continue": ([], 2, "there is nothing to continue"),
    "an empty prompt": (["--prompt", ""], 2, "there is nothing to continue"),
    "two prompts": (["--prompt", "a", "--tokens", "1"], 2, "exclude each other"),
    "no numbers": (["--tokens", "1,x"], 2, "'x' is not a whole number"),
    "negative ids": (["--tokens", "-1"], 2, "'-1' is not a whole number"),
    "an id outside the vocabulary": (["--tokens", "32", "-n", "1"], 1, "token id 32 is not in the vocabulary of 32"),
    "more than the context": (["--tokens", "1", "-n", str(N)], 2, f"exceed the context of {N}"),
    "a missing state": (["--tokens", "1", "--load-state", "/nowhere/state"], 2, "no saved state /nowhere/state"),
    "a state that is none": (["--tokens", "1", "--load-state", __file__], 1, "state"),
    "nowhere to save": (["--tokens", "1", "--save-state", "/nowhere/state"], 2, "does not exist"),
    "a negative count": (["--tokens", "1", "-n", "-1"], 2, "'-n'"),
    "a negative temperature": (["--tokens", "1", "--temperature", "-1"], 2, "'--temperature'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, code, sentence = REFUSALS[name]
    assert cli.run(["run", str(bundle), *arguments]) == code
    out, err = capfd.readouterr()
    assert out == "" and sentence in err and "Traceback" not in err and "defect" not in err


def test_context_counts_what_the_state_holds(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = str(tmp_path / "state")
    _json(capfd, bundle, "--tokens", "1", "-n", "40", "--save-state", state)
    assert cli.run(["run", str(bundle), "--tokens", "1", "-n", "23", "--load-state", state]) == 2
    assert "41 tokens in the state, 1 of prompt and 23 to make exceed" in capfd.readouterr().err


def test_not_a_bundle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["run", str(tmp_path), "--tokens", "1"]) == 2
    assert "is not a bundle directory\nhint: make one with 'edgeseq compile'" in capfd.readouterr().err


def test_a_truncated_bundle(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "bundle"
    shutil.copytree(bundle, mine)
    data = (mine / "model.edgeseq").read_bytes()
    (mine / "model.edgeseq").write_bytes(data[:-100])
    assert cli.run(["run", str(mine), "--tokens", "1"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and "defect" not in err


def test_a_broken_tokenizer(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "bundle"
    shutil.copytree(bundle, mine)
    (mine / "tokenizer.json").write_text("{}")
    assert cli.run(["run", str(mine), "--prompt", "x"]) == 1
    assert "is not a tokenizer" in capfd.readouterr().err
