"""The 40-line C program against a real bundle: built by gcc and by zig, it says what `edgeseq run` says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from runtimes import C_DIR

from .support import QEMU, done, folder, once

ZIG = [sys.executable, "-m", "ziglang", "cc"]
PROMPT, COUNT = "a kind of tree that", 60


@cache
def bundle(target: str) -> Path:
    """The shipped byte model for `target`."""
    export = once(folder() / "tiny.export", lambda out: done("export", "zoo:tiny-mamba", "-o", out))
    return once(folder() / f"tiny.{target}", lambda out: done("compile", export, "--target", target, "-o", out))


@cache
def spoken() -> str:
    return done("run", bundle("host"), "--prompt", PROMPT, "-n", COUNT)


def says(
    compiler: list[str], flags: list[str], where: Path, target: str = "host", runner: tuple[str, ...] = ()
) -> None:
    made = bundle(target)
    program = where / "hello"
    source = C_DIR / "examples" / "hello.c"
    command = [
        *compiler,
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Werror",
        str(source),
        "-I",
        str(made),
        "-o",
        str(program),
        *flags,
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([*runner, str(program), str(made / "model.edgeseq"), PROMPT, str(COUNT)], capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.decode() == PROMPT + spoken()
    assert len(set(spoken().split())) > 3


def libmodel(target: str) -> str:
    return str(bundle(target) / "libmodel.a")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_gcc(tmp_path: Path) -> None:
    says(["gcc"], [libmodel("host"), "-pthread", "-lm"], tmp_path)


def test_gcc_with_the_shared_library(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    flags = ["-L", str(bundle("host")), "-lmodel", f"-Wl,-rpath,{bundle('host')}"]
    says(["gcc"], flags, tmp_path)


@pytest.mark.slow
def test_zig(tmp_path: Path) -> None:
    says(ZIG, [libmodel("host"), "-pthread", "-lm"], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="qemu-user-static is not installed")
def test_zig_for_the_device(tmp_path: Path) -> None:
    flags = [libmodel("raspberry-pi-5"), "-target", "aarch64-linux-musl", "-static"]
    says(ZIG, flags, tmp_path, "raspberry-pi-5", (str(QEMU),))
