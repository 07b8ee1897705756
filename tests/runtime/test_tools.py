"""The device driver and the example, as programs: what they print, write and refuse."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import edgeseq
from runtimes import C_DIR

from . import build, handmade
from .test_session import TOKENS, close, expected

IDS = ",".join(map(str, TOKENS[:20]))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tools") / "edgeseq-device"
    return build.program(out, C_DIR / "tools" / "edgeseq_device.c", ["-O2"], build.KERNELS)


def say(driver: Path, bundle: Path, *arguments: str | Path) -> list[dict]:
    lines = build.run([driver, bundle / "model.edgeseq", *arguments]).splitlines()
    return [json.loads(line) for line in lines]


def test_info_and_check(driver: Path, handmade_bundle: Path) -> None:
    (info,) = say(driver, handmade_bundle, "info", "--threads", "2")
    with edgeseq.load(handmade_bundle) as model:
        assert info["model_id"] == model.info.model_id and info["session_bytes"] == model.info.session_bytes
    assert info["graph_tokens"] == [1, 4, 8] and info["vocab"] == handmade.V and info["n_threads"] == 2
    assert (info["device"], info["device_session_bytes"]) == ("CPU, 2 threads", 0)
    assert say(driver, handmade_bundle, "check") == [{"weights": "good"}]


def test_run_is_what_the_binding_generates(driver: Path, handmade_bundle: Path) -> None:
    (made,) = say(driver, handmade_bundle, "run", "--tokens", IDS, "-n", "12")
    with edgeseq.load(handmade_bundle) as model:
        session = model.session()
        session.prefill(TOKENS[:20])
        assert made["tokens"] == list(session.generate(12))
    assert (made["prompt_tokens"], made["position"]) == (20, 32)
    text = build.run([driver, handmade_bundle / "model.edgeseq", "run", "--tokens", IDS, "-n", "12", "--raw"])
    assert text.encode() == bytes(made["tokens"])


def test_a_drawn_stream_repeats_with_its_seed(driver: Path, handmade_bundle: Path) -> None:
    def draw(seed: int) -> list[int]:
        more = ["--temperature", "30", "--top-k", "20", "--top-p", "0.9", "--penalty", "1.2", "--seed", str(seed)]
        return say(driver, handmade_bundle, "run", "--tokens", IDS, "-n", "20", *more)[0]["tokens"]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("cut", ["1", "8", "3,5,1,9", "20"])
def test_logits_are_the_definition_under_any_cut(driver: Path, handmade_bundle: Path, tmp_path: Path, cut: str) -> None:
    out = tmp_path / "logits"
    said = say(driver, handmade_bundle, "logits", "--tokens", IDS, "--cut", cut, "--out", out, "--poison")
    sizes = [int(c) for c in cut.split(",")]
    ends, i = [0], 0
    while ends[-1] < 20:
        ends.append(min(20, ends[-1] + sizes[min(i, len(sizes) - 1)]))
        i += 1
    rows = np.fromfile(out, np.float32).reshape(-1, handmade.V)
    close(rows, expected(TOKENS[:20])[np.array(ends[1:]) - 1])
    assert said == [{"rows": len(rows), "vocab": handmade.V, "position": 20}]


def test_a_state_travels_between_processes_and_the_binding(driver: Path, handmade_bundle: Path, tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "logits"
    say(driver, handmade_bundle, "logits", "--tokens", IDS, "--out", out, "--save-state", state)
    assert say(driver, handmade_bundle, "state", "--load-state", state)[0]["position"] == 20
    with edgeseq.load(handmade_bundle) as model:
        session = model.session()
        session.load(state.read_bytes())
        close(session.step(7), expected(np.append(TOKENS[:20], 7))[-1])
        state.write_bytes(session.save())
    (tmp_path / "ids").write_text("1 2\n3")
    more = ["--load-state", state, "--tokens-file", tmp_path / "ids"]
    say(driver, handmade_bundle, "logits", "--out", out, "--cut", "3", *more)
    close(np.fromfile(out, np.float32), expected(np.append(TOKENS[:20], [7, 1, 2, 3]))[-1])


def test_bench_lines(driver: Path, handmade_bundle: Path) -> None:
    arguments = ["-p", "8,16", "-n", "4", "-d", "0,30", "-r", "3", "--bytes", "4194304", "--threads", "2"]
    lines = say(driver, handmade_bundle, "bench", *arguments)
    tests = [(line["test"], line.get("n_depth")) for line in lines]
    assert tests == [
        ("pp8", 0), ("pp16", 0), ("tg4", 0), ("pp8", 30), ("pp16", 30), ("tg4", 30), ("memory", None), ("machine", None)
    ]  # fmt: skip
    assert all(len(line["samples_ns"]) == 3 and min(line["samples_ns"]) > 0 for line in lines[:6])
    assert len(lines[2]["token_ns"]) == 12 and (lines[2]["n_prompt"], lines[2]["n_gen"]) == (0, 4)
    assert lines[6]["peak_rss_bytes"] > 0 and lines[7]["read_bw"] > 1e8 and lines[7]["launch_ns"] > 0


WRONG: list[tuple[int, str, list[str]]] = [
    (2, "unknown command", ["fly"]),
    (2, "unknown option", ["info", "--wings", "2"]),
    (2, "its value is missing", ["run", "--tokens"]),
    (2, "not a list of numbers", ["run", "--tokens", "1,x"]),
    (2, "not a list of numbers", ["run", "--tokens", "-1"]),
    (2, "not a number", ["run", "--tokens", "1", "--temperature", "hot"]),
    (2, "give --tokens", ["run"]),
    (2, "give --out", ["logits", "--tokens", "1"]),
    (2, "depths must rise", ["bench", "-d", "5,3", "-p", "1", "-n", "1", "--bytes", "65536"]),
    (2, "at least one token", ["logits", "--tokens", "1", "--cut", "0", "--out", "/dev/null"]),
    (2, "too long a list", ["info", "--cores", ",".join(["0"] * 65)]),
    (1, "not in the vocabulary", ["run", "--tokens", "1,32"]),
    (1, "outgrow the context", ["run", "--tokens", "1,2", "-n", "63"]),
    (1, "not a saved state", ["state", "--load-state", str(Path(__file__))]),
    (1, "cannot be read", ["state", "--load-state", "/nowhere"]),
    (1, "cannot be written", ["run", "--tokens", "1", "-n", "1", "--save-state", "/nowhere/state"]),
    (1, "cannot be pinned", ["info", "--threads", "2", "--cores", "999"]),
    (1, "sampler", ["run", "--tokens", "1", "--top-p", "2"]),
]


@pytest.mark.parametrize(("code", "sentence", "arguments"), WRONG, ids=[" ".join(a)[:40] for _, _, a in WRONG])
def test_refusals(driver: Path, handmade_bundle: Path, code: int, sentence: str, arguments: list[str]) -> None:
    model = str(handmade_bundle / "model.edgeseq")
    done = subprocess.run([str(driver), model, *arguments], capture_output=True, text=True)
    assert done.returncode == code and sentence in done.stderr, done.stderr
    assert done.stderr.startswith("edgeseq-device: ") and done.stderr.count("\n") == 1


def test_what_is_no_bundle(driver: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        done = subprocess.run([str(driver), str(path), "info"], capture_output=True, text=True)
        assert done.returncode == 1 and "edgeseq-device: " in done.stderr
    assert subprocess.run([str(driver)], capture_output=True).returncode == 2


def hello_says(program: list[str | Path], bundle: Path) -> None:
    """The example prints the prompt and what the binding generates."""
    with edgeseq.load(bundle) as model:
        session = model.session()
        session.prefill(model.encode("\x05\x06\x07"))
        made = bytes(session.generate(20))
    done = subprocess.run(
        [*map(str, program), str(bundle / "model.edgeseq"), "\x05\x06\x07", "20"], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"\x05\x06\x07" + made + b"\n"


def test_hello_with_gcc(handmade_bundle: Path, tmp_path: Path) -> None:
    hello = C_DIR / "examples" / "hello.c"
    assert len(hello.read_text().splitlines()) <= 45, "the example stays an example"
    hello_says([build.program(tmp_path / "hello", hello, ["-O2"], build.KERNELS)], handmade_bundle)
    done = subprocess.run([str(tmp_path / "hello"), "/nowhere", "a", "1"], capture_output=True, text=True)
    assert done.returncode == 1 and "'/nowhere' cannot be opened" in done.stderr


@pytest.mark.slow
def test_hello_with_zig(handmade_bundle: Path, tmp_path: Path) -> None:
    hello = C_DIR / "examples" / "hello.c"
    flags = ["-O2", "-target", "x86_64-linux-gnu.2.28"]
    hello_says([build.program(tmp_path / "hello", hello, flags, build.KERNELS, compiler=build.ZIG)], handmade_bundle)


@pytest.mark.slow
@pytest.mark.skipif(build.QEMU is None, reason="qemu-aarch64-static is not installed")
def test_everything_on_aarch64(handmade_bundle: Path, tmp_path: Path) -> None:
    """Static musl programs under qemu: tests, example, and the driver's logits against the definition."""
    assert build.QEMU is not None
    flags = ["-O2", "-target", "aarch64-linux-musl", "-static"]
    model = handmade_bundle / "model.edgeseq"
    for name in ("test_api", "test_pool", "test_threads"):
        test = build.program(tmp_path / name, C_DIR / "tests" / f"{name}.c", flags, build.KERNELS, compiler=build.ZIG)
        assert build.run([build.QEMU, test, model][: 2 if name == "test_pool" else 3]) == "ok\n"
    hello = C_DIR / "examples" / "hello.c"
    made = build.program(tmp_path / "hello", hello, flags, build.KERNELS, compiler=build.ZIG)
    hello_says([build.QEMU, made], handmade_bundle)
    tool = C_DIR / "tools" / "edgeseq_device.c"
    driver = build.program(tmp_path / "driver", tool, flags, build.KERNELS, compiler=build.ZIG)
    state, out = tmp_path / "state", tmp_path / "logits"
    arguments = ["logits", "--tokens", IDS, "--cut", "8,3", "--out", out, "--save-state", state]
    build.run([build.QEMU, driver, model, *arguments])
    close(np.fromfile(out, np.float32).reshape(-1, handmade.V)[-1], expected(TOKENS[:20])[-1])
    with edgeseq.load(handmade_bundle) as here:
        session = here.session()
        session.load(state.read_bytes())
        close(session.step(3), expected(np.append(TOKENS[:20], 3))[-1])


def test_profile_times_every_launch_of_a_graph(driver: Path, handmade_bundle: Path) -> None:
    with edgeseq.load(handmade_bundle) as model:
        launches = [g.n_launches for g in model.info.graphs]
    for graph, n in enumerate(launches):
        lines = say(driver, handmade_bundle, "profile", "--graph", str(graph), "-r", "3", "--threads", "2")
        assert [(line["test"], line["graph"], line["n_threads"]) for line in lines] == [("profile", graph, 2)] * 3
        assert all(len(line["launch_ns"]) == n and all(ns > 0 for ns in line["launch_ns"]) for line in lines)
    with pytest.raises(AssertionError, match="--graph"):
        say(driver, handmade_bundle, "profile", "--graph", "9")
