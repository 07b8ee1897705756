"""Compiles the runtime, its tools and the hand-made bundle, once per set of flags and session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from runtimes import C_DIR, sources

from . import handmade

WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
HIDDEN = ["-fvisibility=hidden", "-pthread", f"-I{C_DIR / 'include'}"]
ZIG = [sys.executable, "-m", "ziglang", "cc"]
QEMU = shutil.which("qemu-aarch64-static")
KERNELS = C_DIR / "tests" / "handmade_kernels.c"


def run(command: list[str | Path], timeout: float = 300, env: dict[str, str] | None = None) -> str:
    """Standard output; a failure shows the whole conversation."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compile_c(out: Path, files: list[Path], flags: list[str], compiler: list[str] | None = None) -> Path:
    """One command from C files to `out`."""
    command = [*(compiler or ["gcc"]), *WARNINGS, *HIDDEN, *flags, "-o", out, *files]
    run(command)
    return out


def plan_id() -> str:
    return f"-DPLAN_ID=0x{handmade.parts().plan_id:08x}u"


def program(out: Path, main: Path, flags: list[str], compiler: list[str] | None = None) -> Path:
    """A program: runtime + hand-made kernels + `main`."""
    return compile_c(out, [*sources(), KERNELS, main], [plan_id(), *flags], compiler)


def bundle(directory: Path) -> Path:
    """The hand-made bundle: model.edgeseq and libmodel.so."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.edgeseq").write_bytes(handmade.parts().build())
    compile_c(directory / "libmodel.so", [*sources(), KERNELS], [plan_id(), "-O2", "-fPIC", "-shared"])
    return directory
