"""The C runtime as one file: its own headers once, then every source that the backend needs."""

from __future__ import annotations

import re
from pathlib import Path

from runtimes import C_DIR, sources

BACKENDS = {"opencl": "ES_WITH_OPENCL", "cuda": "ES_WITH_CUDA"}
_INCLUDE = re.compile(r'^#include [<"]((?:edgeseq|es_\w+)\.h)[>"]\n', re.M)


def amalgamation(backend: str) -> str:
    """C99 text that includes edgeseq.h and the system's headers alone. backend: "cpu", "opencl" or "cuda"."""
    others = tuple(name for name in BACKENDS if name != backend)
    seen: set[str] = set()
    parts = [
        "/* The edgeseq runtime in one file, made from runtimes/c by `edgeseq package`. C99 and POSIX threads.\n"
        " * SPDX-License-Identifier: Apache-2.0 */\n"
        "#ifndef _GNU_SOURCE\n#define _GNU_SOURCE 1\n#endif\n"
    ]
    if backend in BACKENDS:
        parts.append(f"#define {BACKENDS[backend]} 1\n")
    parts.append('#include "edgeseq.h"\n')
    for source in sources():
        if not source.stem.startswith(others):
            parts.append(_inlined(source, seen))
    return "\n".join(parts)


def _inlined(path: Path, seen: set[str]) -> str:
    """A file with our own headers in the place of their first inclusion."""

    def header(match: re.Match[str]) -> str:
        name = match[1]
        if name == "edgeseq.h" or name in seen:
            return ""
        seen.add(name)
        return _inlined(C_DIR / "src" / name, seen)

    return f"/* ---- {path.name} ---- */\n" + _INCLUDE.sub(header, path.read_text())
