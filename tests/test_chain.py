"""From a trained model to tokens, through the commands: every way to run a bundle makes the same tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import edgeseq.cli as cli
from devices.profile import load_profile
from devices.transports import open_transport

pytestmark = pytest.mark.slow
PROMPT = "a small animal that lives in the "
N = 64


def edgeseq(*arguments: object) -> None:
    assert cli.run([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chain") / "export"
    edgeseq("export", "zoo:tiny-mamba", "-o", out)
    return out


@pytest.fixture(scope="module")
def host(export: Path) -> Path:
    edgeseq("compile", export, "--target", "host", "-o", export.parent / "host")
    return export.parent / "host"


def _ids() -> str:
    return ",".join(map(str, PROMPT.encode()))


@pytest.fixture(scope="module")
def tokens(host: Path) -> list[int]:
    import edgeseq as api

    with api.load(host) as model, model.session() as session:
        session.prefill(PROMPT.encode())
        return list(session.generate(N))


def test_it_speaks(host: Path, tokens: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    edgeseq("run", host, "--prompt", PROMPT, "-n", N, "--json")
    result = json.loads(capfd.readouterr().out)
    assert result["tokens"] == tokens
    assert result["text"] == bytes(tokens).decode()
    words = set(result["text"].split())
    assert len(words) >= 3 and {"of", "the"} & words and result["text"].isprintable()


@pytest.mark.parametrize("device", ["host", "qemu-aarch64"])
def test_the_driver_makes_the_same_tokens(
    device: str, export: Path, host: Path, tokens: list[int], tmp_path: Path
) -> None:
    profile = load_profile(device)
    if profile.transport == "qemu" and shutil.which("qemu-aarch64-static") is None:
        pytest.skip("qemu-user-static is not installed")
    bundle = host
    if device != "host":
        bundle = tmp_path / "bundle"
        edgeseq("compile", export, "--target", "raspberry-pi-5", "-o", bundle)
    with open_transport(profile) as transport:
        done = transport.driver(transport.push(bundle), "run", "--tokens", _ids(), "-n", str(N), "--raw")
    assert done.stdout.encode() == bytes(tokens)


def test_compiling_twice_gives_the_same_bytes(export: Path, host: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(export, moved)
    edgeseq("compile", moved, "--target", "host", "-o", tmp_path / "again")
    files = sorted(path.name for path in host.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (host / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_foreign_bundle_is_refused_here(export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import platform

    if platform.machine() == "aarch64":
        pytest.skip("this machine is what the bundle is for")
    edgeseq("compile", export, "--target", "raspberry-pi-5", "-o", tmp_path / "pi")
    capfd.readouterr()
    assert cli.run(["run", str(tmp_path / "pi"), "--prompt", "x"]) == 1
    err = capfd.readouterr().err
    assert "cannot be loaded here" in err and "hint: " in err and "defect" not in err


def test_an_interrupted_compile_leaves_nothing(export: Path, tmp_path: Path) -> None:
    import signal
    import sys
    import time

    out = tmp_path / "out"
    for delay in (1.0, 3.0):
        command = [sys.executable, "-m", "edgeseq", "compile", str(export), "--target", "host", "-o", str(out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:
            assert [p.name for p in tmp_path.iterdir()] == ["out"]
            shutil.rmtree(out)
        else:
            assert process.returncode == 130 and "Traceback" not in err
            assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["hots", "raspberry-pi-9", "./missing.toml"])
def test_an_unknown_target(target: str, export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compile", str(export), "--target", target, "-o", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and target in err and "hint: " in err
    assert list(tmp_path.iterdir()) == []
