"""Compiles the runtime, its tools and the hand-made bundle, once per set of flags and session."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from runtimes import C_DIR, sources

from . import handmade, handmade_gpu

WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
HIDDEN = ["-fvisibility=hidden", "-pthread", f"-I{C_DIR / 'include'}"]
ZIG = [sys.executable, "-m", "ziglang", "cc"]
QEMU = shutil.which("qemu-aarch64-static")
KERNELS = C_DIR / "tests" / "handmade_kernels.c"
NO_KERNELS = C_DIR / "tests" / "handmade_table.c"


def run(command: Sequence[str | Path], timeout: float = 300, env: dict[str, str] | None = None) -> str:
    """Standard output; a failure shows the whole conversation."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compile_c(out: Path, files: Sequence[Path], flags: list[str], compiler: list[str] | None = None) -> Path:
    """One command from C files to `out`."""
    command = [*(compiler or ["gcc"]), *WARNINGS, *HIDDEN, *flags, "-o", out, *files]
    run(command)
    return out


SANITIZE = ["-g", "-O1", "-fno-sanitize-recover=all"]


def plan_id(parts: handmade.Parts | None = None) -> str:
    return f"-DPLAN_ID=0x{(parts or handmade.parts()).plan_id:08x}u"


@cache
def core(flags: tuple[str, ...], compiler: tuple[str, ...] = ("gcc",)) -> list[Path]:
    """The runtime's objects, compiled once per set of flags, two at a time."""
    out = Path(tempfile.mkdtemp(prefix="edgeseq-core-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    objects = [out / f"{source.stem}.o" for source in sources()]

    def one(source: Path, target: Path) -> None:
        run([*compiler, *WARNINGS, *HIDDEN, *flags, "-c", source, "-o", target])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, sources(), objects))
    return objects


def program(
    out: Path,
    main: Path,
    flags: list[str],
    *more: Path,
    compiler: list[str] | None = None,
    parts: handmade.Parts | None = None,
) -> Path:
    """A program: the runtime, `main` and `more` C files (KERNELS for the hand-made ones, NO_KERNELS for those of a GPU,
    whose `parts` then give the plan's number)."""
    objects = core(tuple(f for f in flags if not f.startswith("-Wl,")), tuple(compiler or ["gcc"]))
    return compile_c(out, [main, *more, *objects], [plan_id(parts), *flags, "-ldl"], compiler)


def bundle(directory: Path) -> Path:
    """The hand-made bundle: model.edgeseq and libmodel.so."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.edgeseq").write_bytes(handmade.parts().build())
    program(directory / "libmodel.so", KERNELS, ["-O2", "-fPIC", "-shared"])
    return directory


def gpu_bundle(directory: Path, parts: handmade.Parts | None = None, flags: Sequence[str] = ("-O2",)) -> Path:
    """The hand-made bundle for OpenCL, or other `parts` of it; its runtime has the OpenCL backend."""
    parts = parts or handmade_gpu.parts()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.edgeseq").write_bytes(parts.build())
    flags = [*flags, "-DES_WITH_OPENCL", "-fPIC", "-shared"]
    program(directory / "libmodel.so", NO_KERNELS, flags, parts=parts)
    return directory


@cache
def opencl_missing() -> str:
    """Why nothing can run on OpenCL here; empty when it can."""
    try:
        library = ctypes.CDLL("libOpenCL.so.1")
    except OSError:
        return "no OpenCL driver: apt-get install pocl-opencl-icd ocl-icd-libopencl1"
    platforms, n = (ctypes.c_void_p * 16)(), ctypes.c_uint32()
    if library.clGetPlatformIDs(16, platforms, ctypes.byref(n)) or not n.value:
        return "the OpenCL loader knows no driver: apt-get install pocl-opencl-icd"
    return ""
