"""Kernels and the C runtime to libmodel.so, libmodel.a and the static device driver, by zig for any target."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgeseq.errors import CompileError
from runtimes import C_DIR

from .targets import Target

FLAGS = ["-std=c99", "-O2", "-g0", "-fno-sanitize=all", "-fvisibility=hidden", "-Wall", "-Wextra"]


BACKENDS = {"cpu": [], "opencl": ["-DES_WITH_OPENCL"], "cuda": ["-DES_WITH_CUDA"]}


def link(target: Target, kernels: Path | None, table: Path, out: Path) -> None:
    """Write libmodel.so, libmodel.a, edgeseq.h and edgeseq-device into `out`. Raises CompileError with zig's words.

    kernels: the object file of CPU kernels; None for a GPU, whose code lies in the bundle."""
    exports = out / "exports.map"
    exports.write_text("{ global: es_*; local: *; };\n")
    common = _common(target, kernels, table)
    _zig("cc", "-target", target.shared, "-shared", "-fPIC", "-s", f"-Wl,--version-script={exports}",
         "-Wl,-soname,libmodel.so", "-o", str(out / "libmodel.so"), *common, *_libraries(kernels))  # fmt: skip
    exports.unlink()
    _archive(target, kernels, table, out)
    link_driver(target, kernels, table, out)
    (out / "edgeseq.h").write_bytes((C_DIR / "include" / "edgeseq.h").read_bytes())


def link_driver(target: Target, kernels: Path | None, table: Path, out: Path) -> None:
    """Write edgeseq-device into `out`; for a GPU, whose driver is opened at run time, it is linked dynamically."""
    tool = C_DIR / "tools" / "edgeseq_device.c"
    program = ["-target", target.static, "-static"] if kernels else ["-target", target.shared]
    tail = [] if kernels else _libraries(kernels)
    _zig("cc", *program, "-s", "-o", str(out / "edgeseq-device"), str(tool), *_common(target, kernels, table), *tail)


def _common(target: Target, kernels: Path | None, table: Path) -> list[str]:
    return [*_flags(target), *_sources(), str(table), *([str(kernels)] if kernels else [])]


def _flags(target: Target) -> list[str]:
    return [*FLAGS, "-I", str(C_DIR / "include"), *BACKENDS[target.backend]]


def _sources() -> list[str]:
    return [str(p) for p in sorted((C_DIR / "src").glob("*.c"))]


def _libraries(kernels: Path | None) -> list[str]:
    return ["-lpthread", "-lm"] if kernels else ["-lpthread", "-ldl"]


def _archive(target: Target, kernels: Path | None, table: Path, out: Path) -> None:
    """libmodel.a, for apps that link statically: the runtime as one object, made by one call, and the model's."""
    objects = [table.parent / "es_runtime.o", table.parent / f"es_{table.stem}.o", *([kernels] if kernels else [])]
    for options, sources, made in (["-r"], _sources(), objects[0]), (["-c"], [str(table)], objects[1]):
        _zig("cc", "-target", target.shared, *options, "-fPIC", *_flags(target), *sources, "-o", str(made))
    _zig("ar", "rcsD", str(out / "libmodel.a"), *map(str, objects))


def _zig(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ziglang", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise CompileError(f"zig {arguments[0]} failed: {words[0] if words else 'no message'}", "; ".join(words[1:4]))
