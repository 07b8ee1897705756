"""The command: what its rows hold, what it refuses, and that nothing wrong is timed. No figure is asserted."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import edgeseq.cli as cli
from tests import bundles
from tests.verify.test_chain import flip

LLAMA_BENCH = {
    "build_commit": str, "build_number": int, "cpu_info": str, "gpu_info": str, "backends": str,
    "model_filename": str, "model_type": str, "model_size": int, "model_n_params": int, "n_batch": int,
    "n_ubatch": int, "n_threads": int, "type_k": str, "type_v": str, "n_gpu_layers": int, "use_mmap": bool,
    "n_prompt": int, "n_gen": int, "n_depth": int, "test_time": str, "avg_ns": int, "stddev_ns": int,
    "avg_ts": float, "stddev_ts": float, "samples_ns": list, "samples_ts": list,
}  # fmt: skip
OURS = {
    "test": str, "model_id": str, "device": str, "median_ts": float, "depth_by": str, "bytes_per_token": int,
    "weight_bytes": int, "state_bytes_rw": int, "kv_bytes_read": int, "activation_bytes": int, "read_bw_gbs": float,
    "roof": str, "achieved_gbs": float, "weights_gbs": float, "roof_fraction": float, "bound_ts": float,
    "state_bytes": int, "peak_rss_bytes": int, "verified": bool, "verified_worst": float,
    "verified_tolerance": float,
}  # fmt: skip
OPTIONAL = {
    "ttft_ms",
    "p50_ms",
    "p99_ms",
    "weights_bw_gbs",
    "joules_per_token",
    "clock_mhz",
    "temperature_c",
    "load_avg",
}


PROFILE = {"test", "model_filename", "backends", "n_threads", "kernel", "launches", "ns", "share", "bytes", "gbs"}


def bench(*arguments: object) -> int:
    return cli.run(["bench", *map(str, arguments)])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_schema(row: dict[str, Any]) -> None:
    assert set(row) == set(LLAMA_BENCH) | set(OURS) | OPTIONAL
    for name, kind in (LLAMA_BENCH | OURS).items():
        assert type(row[name]) is kind, (name, row[name])
    for name in OPTIONAL:
        assert row[name] is None or type(row[name]) is float, (name, row[name])


def test_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert bench(bundles.bundled("mamba"), "-p", "20", "-n", "4", "-d", "0,7", "-r", "3", "-t", "1", "--json", out) == 0
    table, err = capfd.readouterr()
    assert err == "" and "pp20 @ d7" in table and "verified" in table
    rows = rows_of(out)
    assert [row["test"] for row in rows] == ["pp20", "tg4", "pp20 @ d7", "tg4 @ d7"]
    for row in rows:
        check_schema(row)
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 3 and row["n_threads"] == 1
        tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == [pytest.approx(tokens * 1e9 / ns) for ns in row["samples_ns"]]
        assert (row["ttft_ms"] is None) == (row["n_gen"] > 0) == (row["p99_ms"] is not None)
        assert row["verified"] is True and row["verified_worst"] < row["verified_tolerance"]
        assert row["peak_rss_bytes"] < 64 << 20  # of the driver alone, not of this process


def test_a_recurrent_model_beside_a_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "rows.jsonl", tmp_path / "report.html"
    pair = bundles.bundled("mamba"), bundles.bundled("transformer")
    assert bench(*pair, "--context", "0,8,96", "-n", "4", "-r", "2", "--json", out, "--report", page) == 0
    rows = rows_of(out)
    names = [str(path) for path in pair]
    assert [(r["n_depth"], r["model_filename"]) for r in rows[:-1]] == [(d, n) for d in (0, 8, 96) for n in names]
    last = rows[-1]
    assert last["test"] == "crossover" and last["depths"] == [0, 8, 96]
    assert {"predicted_depth", "measured_depth", "measured_is", "predicted_ts", "read_bw_gbs"} <= set(last)
    mamba, cached = ([r for r in rows[:-1] if r["model_filename"] == n] for n in names)
    assert len({r["bytes_per_token"] for r in mamba}) == 1 and {r["kv_bytes_read"] for r in mamba} == {0}
    read = [r["kv_bytes_read"] for r in cached]
    assert read == sorted(read) and read[0] > 0
    text = capfd.readouterr().out
    assert "tokens per second" in text and "is faster than" in text
    check_page(page.read_text(), 2)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]


def check_page(text: str, figures: int) -> None:
    """Figures stand in the page, nothing is loaded from elsewhere, nothing is left of the template."""
    page = _Page()
    page.feed(text)
    assert page.tags.count("svg") == figures and page.links == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "{{" not in text and "{%" not in text and "None" not in text and "nan" not in text
    for part in ("bound by bandwidth", "runtime step", "Command", "cache read"):
        assert part in text, part


def test_a_name_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    bundle, page = tmp_path / "a<b>&amp;$x_1$", tmp_path / "report.html"
    shutil.copytree(bundles.bundled("mamba"), bundle)
    assert bench(bundle, "-p", "0", "-n", "2", "-d", "0,4", "-r", "1", "--report", page) == 0
    assert "<b>" not in page.read_text()


def test_against_the_same_weights_elsewhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    rivals = ["--against", "onnxruntime", "--against", "torch", "--export", bundles.exported("mamba")]
    assert bench(bundles.bundled("mamba"), *rivals, "-p", "8", "-n", "2", "-r", "2", "-t", "1", "--json", out) == 0
    rows = rows_of(out)
    tests = [row for row in rows if row["test"] != "ratio"]
    assert [row["backends"] for row in tests] == ["CPU", "onnxruntime", "torch"] * 2
    ratios = {(r["case"], r["against"]): r["ratio"] for r in rows if r["test"] == "ratio"}
    assert set(ratios) == {(test, rival) for test in ("pp8", "tg2") for rival in ("onnxruntime", "torch")}
    rate = {(r["test"], r["backends"]): r["median_ts"] for r in tests}
    assert ratios["pp8", "torch"] == pytest.approx(rate["pp8", "CPU"] / rate["pp8", "torch"])
    assert all(r["bytes_per_token"] is None for r in tests if r["backends"] != "CPU")
    assert "times onnxruntime" in capfd.readouterr().out


def test_what_is_wrong_is_not_timed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle, out = tmp_path / "mamba", tmp_path / "rows.jsonl"
    shutil.copytree(bundles.bundled("mamba"), bundle)
    flip(bundle / "model.edgeseq", (bundle / "model.edgeseq").stat().st_size - 1)
    assert bench(bundle, "-n", "1", "-p", "1", "--json", out) == 1
    text, err = capfd.readouterr()
    assert text == "" and "is not timed" in err and "hint: " in err
    assert not out.exists()


def test_without_a_golden_a_row_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle, out = tmp_path / "mamba", tmp_path / "rows.jsonl"
    shutil.copytree(bundles.bundled("mamba"), bundle)
    (bundle / "golden.safetensors").unlink()
    assert bench(bundle, "-n", "1", "-p", "0", "-r", "1", "--json", out) == 0
    assert rows_of(out)[0]["verified"] is None
    assert "not all verified" in capfd.readouterr().out


def test_on_a_device_its_driver_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    pair = bundles.bundled("mamba"), bundles.bundled("transformer")
    assert bench(*pair, "--device", "host", "-p", "8", "-n", "2", "-d", "0,5", "-r", "2", "-t", "1", "--json", out) == 0
    rows = rows_of(out)
    assert [r["test"] for r in rows[::2]] == ["pp8", "tg2", "pp8 @ d5", "tg2 @ d5"]
    for row in rows:
        assert set(row) == set(LLAMA_BENCH) | set(OURS) | OPTIONAL
        assert len(row["samples_ns"]) == 2 and row["verified"] is True and row["device"] == "host"
        assert row["read_bw_gbs"] > 0 and row["n_threads"] == 1 and 0 < row["peak_rss_bytes"] < 64 << 20


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--context", "128,1k"], "tg64 @ d128 needs a context of 192"),
        (["-p", "161"], "pp161 needs a context of 161"),
        (["--against", "torch"], "--against needs the weights"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["--context", "1", "-d", "1"], "exclude each other"),
        (["--json", "/nowhere/x.jsonl"], "cannot be written"),
        (["--device", "host", "-t", "1,2"], "one number of threads"),
        (["--device", "hots"], "hots"),
    ],
)
def test_refusals(arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench(bundles.bundled("transformer"), *arguments) == 2
    text, err = capfd.readouterr()
    assert text == "" and sentence in err and "Traceback" not in err


def test_an_export_of_something_else_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    other = ["--against", "torch", "--export", bundles.exported("transformer")]
    assert bench(bundles.bundled("mamba"), *other) == 2
    assert "the export of none of these" in capfd.readouterr().err


@pytest.mark.parametrize("path", ["nothing", "."])
def test_what_is_no_bundle(path: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench(tmp_path / path) == 2
    assert "is not a bundle" in capfd.readouterr().err
