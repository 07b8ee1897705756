"""llama-bench as a rival: what it is asked, what is read of its JSON, what is refused. No figure is asserted.

A stand-in prints what the real program printed (`llama-bench.json`), with the numbers it was asked for put in.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgeseq
from edgeseq.bench import llama_bench
from edgeseq.bundle.reader import BundleFile
from tests import bundles
from tests.bench.test_bench import bench, rows_of

RECORDED = Path(__file__).with_name("llama-bench.json")
STAND_IN = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(here / "asked.jsonl", "a") as log:
    print(json.dumps(asked), file=log)
(row,) = json.loads({recorded!r})
numbers = {{"n_prompt": "-p", "n_gen": "-n", "n_depth": "-d", "n_threads": "-t", "n_gpu_layers": "-ngl"}}
row |= {{name: int(asked[option]) for name, option in numbers.items()}}
row |= {{"model_filename": asked["-m"], "model_n_params": {params}}}
row["samples_ns"] = [(row["n_prompt"] + row["n_gen"]) * 1000000]
{then}
print("[\\n" + json.dumps(row) + "\\n]")
"""


def params_of(bundle: Path) -> int:
    with BundleFile(bundle, check_weights=False) as file:
        return file.plan.manifest.params


def stand_in(folder: Path, then: str = "", params: int | None = None) -> list[object]:
    """Options that name a program which runs `then` before it prints, and a file for it."""
    program, gguf = folder / "llama-bench", folder / "model.gguf"
    text = STAND_IN.format(python=sys.executable, recorded=RECORDED.read_text(), then=then,
                           params=params_of(bundles.bundled("mamba")) if params is None else params)  # fmt: skip
    program.write_text(text)
    program.chmod(0o755)
    gguf.touch()
    return ["--against", "llama-bench", "--gguf", gguf, "--llama-bench", program]


def asked(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]


def test_it_takes_turns_and_the_medians_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, options = tmp_path / "rows.jsonl", stand_in(tmp_path)
    assert (
        bench(bundles.bundled("mamba"), *options, "-p", 8, "-n", 3, "-d", "0,5", "-r", 2, "-t", 1, "--json", out) == 0
    )
    rows = rows_of(out)
    theirs = [row for row in rows if row.get("backends") == "llama-bench"]
    assert [row["test"] for row in theirs] == ["pp8", "tg3", "pp8 @ d5", "tg3 @ d5"]
    recorded = json.loads(RECORDED.read_text())[0]
    for row in theirs:
        assert row["samples_ns"] == [(row["n_prompt"] + row["n_gen"]) * 1_000_000] * 2
        assert row["median_ts"] == pytest.approx(1000.0) and row["verified"] is None
        for name in ("build_commit", "build_number", "model_type", "model_size", "n_batch", "type_k"):
            assert row[name] == recorded[name]
        for name in ("p50_ms", "p99_ms", "ttft_ms", "bytes_per_token", "read_bw_gbs", "peak_rss_bytes"):
            assert row[name] is None, name
        assert row["depth_by"] == ("prefill" if row["n_depth"] else "fresh")
    ours = {row["test"]: row for row in rows if row.get("backends") == "CPU"}
    ratios = [row for row in rows if row["test"] == "ratio"]
    assert [row["case"] for row in ratios] == ["pp8", "tg3", "pp8 @ d5", "tg3 @ d5"]
    for row in ratios:
        assert row["ratio"] == pytest.approx(ours[row["case"]]["median_ts"] / 1000.0)
        assert row["against_type"] == recorded["model_type"] and row["against_build"] == recorded["build_commit"]
    text = capfd.readouterr().out
    assert "times llama-bench (" in text and "llama-bench says no logits" in text
    # one to look at the file; then for every test one to warm up and two repetitions
    tests = [(a["-p"], a["-n"], a["-d"]) for a in asked(tmp_path)]
    wanted = [("8", "0", "0"), ("0", "3", "0"), ("8", "0", "5"), ("0", "3", "5")]
    assert tests == [("0", "1", "0"), *(test for test in wanted for _ in range(3))]
    for a in asked(tmp_path):
        assert (a["-t"], a["-r"], a["-ngl"], a["-dev"], a["-o"]) == ("1", "1", "0", "none", "json")


def test_every_number_of_threads_is_asked_for(tmp_path: Path) -> None:
    out, options = tmp_path / "rows.jsonl", stand_in(tmp_path)
    assert bench(bundles.bundled("mamba"), *options, "-p", 0, "-n", 2, "-r", 1, "-t", "1,2", "--json", out) == 0
    assert [row["n_threads"] for row in rows_of(out) if row["test"] == "ratio"] == [1, 2]
    assert {a["-t"] for a in asked(tmp_path)} == {"1", "2"}


@pytest.mark.parametrize(
    "then, code, sentence",
    [
        ("sys.exit('main: error: failed to load model')", 1, "failed to load model"),
        ("sys.exit(3)", 1, "exit code 3"),
        ("print('', end=''); sys.exit(0)", 1, "printed no JSON"),
        ("print('| model | t/s |'); sys.exit(0)", 1, "printed no JSON, but '| model | t/s |'"),
        ("print('[]'); sys.exit(0)", 1, "did not print one measurement"),
        ("del row['model_size']", 1, "printed model_size as None"),
        ("row['n_threads'] = '2'", 1, "printed n_threads as '2'"),
        ("row['samples_ns'] = []", 1, "for one repetition"),
        ("row['samples_ns'] = [0]", 1, "for one repetition"),
        ("row['n_threads'] = 7", 1, "asked for n_threads 1 and measured 7"),
        ("row['model_n_params'] += 1", 2, "parameters, what it would be compared with"),
        ("if row['n_prompt']: sys.exit('test_prompt: failed to decode prompt batch')", 1, "decode prompt batch"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(
    then: str, code: int, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "rows.jsonl", stand_in(tmp_path, then)
    assert bench(bundles.bundled("mamba"), *options, "-p", 4, "-n", 1, "-r", 1, "-t", 1, "--json", out) == code
    text, err = capfd.readouterr()
    assert text == "" and sentence in err and "Traceback" not in err and not out.exists()


def test_a_file_is_compared_with_the_model_of_its_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of two bundles, only the one with as many parameters gets ratios; two of one size are ambiguous."""
    out, options = tmp_path / "rows.jsonl", stand_in(tmp_path)
    pair = bundles.bundled("mamba"), bundles.bundled("transformer")
    assert bench(*pair, *options, "-p", 0, "-n", 1, "-r", 1, "-t", 1, "--json", out) == 0
    assert [r["model_filename"] for r in rows_of(out) if r["test"] == "ratio"] == [str(pair[0])]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"--gguf": None}, "needs the same model as GGUF"),
        ({"--gguf": "nowhere.gguf"}, "nowhere.gguf is not a file"),
        ({"--llama-bench": "nowhere/llama-bench"}, "is not a program"),
        ({"--llama-bench": None}, "no llama-bench on PATH"),
        ({"--against": "onnxruntime"}, "needs the weights"),
        ({"--against": None}, "are for --against llama-bench"),
    ],
)
def test_what_it_needs(
    change: dict[str, str | None], sentence: str, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", "")
    given = stand_in(tmp_path)
    named = dict(zip(given[::2], given[1::2], strict=True)) | change
    options = [text for name, value in named.items() if value is not None for text in (name, value)]
    assert bench(bundles.bundled("mamba"), *options, "-p", 0, "-n", 1) == 2
    text, err = capfd.readouterr()
    assert text == "" and sentence in err and "hint: " in err and not (tmp_path / "asked.jsonl").exists()


def test_a_program_that_does_not_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = stand_in(tmp_path)
    (tmp_path / "llama-bench").write_bytes(b"\x7fELF and nothing behind it")
    assert bench(bundles.bundled("mamba"), *options, "-p", 0, "-n", 1) == 2
    assert "does not start" in capfd.readouterr().err


def test_it_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert llama_bench.Program.find(None, tmp_path / "model.gguf").path == str(tmp_path / "llama-bench")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("llama-bench") is None, reason="needs llama-bench on PATH")
def test_the_real_program(tmp_path: Path) -> None:
    """On a GGUF made with llama.cpp's converter, whose tree is two folders above a built llama-bench."""
    tree = Path(shutil.which("llama-bench") or "").resolve().parents[2]
    if not (tree / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama-bench on PATH does not lie in build/bin of a source tree, so there is no converter")
    making = [
        sys.executable,
        "scripts/gguf.py",
        "zoo:tiny-mamba",
        "--llama-cpp",
        tree,
        "-o",
        tmp_path,
        "--types",
        "F16",
    ]
    subprocess.run(making, check=True, capture_output=True)
    edgeseq.export("zoo:tiny-mamba", tmp_path / "export")
    edgeseq.compile(tmp_path / "export", "host", tmp_path / "bundle")
    out, options = tmp_path / "rows.jsonl", ["--against", "llama-bench", "--gguf", tmp_path / "tiny-mamba-F16.gguf"]
    assert bench(tmp_path / "bundle", *options, "-p", 8, "-n", 2, "-r", 1, "-t", 1, "--json", out) == 0
    rows = [row for row in rows_of(out) if row.get("backends") == "llama-bench"]
    assert [row["test"] for row in rows] == ["pp8", "tg2"] and all(row["samples_ns"][0] > 0 for row in rows)
    assert all(row["model_type"].endswith("F16") for row in rows)
