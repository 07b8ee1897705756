"""What CUDA's compiler makes of kernels, read from its text; no GPU is needed for that."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edgeseq.compiler.gpu.codegen import GpuKernelSet
from edgeseq.compiler.ir import KernelRef
from edgeseq.compiler.targets import resolve

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def made_for(target: str, kernels: list[tuple[str, Any]]) -> tuple[str, list[str]]:
    """Program text, and the name of each (operator, parameters)."""
    made = GpuKernelSet(resolve(target))
    names = [made.add(KernelRef(op, p), len(p.args)) for op, p in kernels]
    return made.source(), names


def nvcc(source: str, out: Path, *arguments: str) -> str:
    """out/image; what the compiler says."""
    (out / "kernels.cu").write_text(source)
    command = ["nvcc", *arguments, "--std=c++17", "-O3", "-o", str(out / "image"), str(out / "kernels.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    return done.stderr


def loops(target: str, kernel: tuple[str, Any], out: Path) -> list[str]:
    """PTX of the kernel's innermost loops, in order."""
    source, _ = made_for(target, [kernel])
    nvcc(source, out, "-ptx", f"-arch=compute_{target.removeprefix('cuda-sm')}")
    found = re.findall(r"^(\$L\w+):$(.*?)^\s*@?\S*\s*bra(?:\.uni)?\s+\1;", (out / "image").read_text(), re.S | re.M)
    return [body for _, body in found]


def stack_of(said: str) -> dict[str, tuple[int, int]]:
    """By kernel, what `-Xptxas -v` says of it: bytes of its stack frame, bytes spilled."""
    found = re.findall(r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill", said, re.S)
    return {name: (int(frame), int(spilled)) for name, frame, spilled in found}


def loads(text: str, name: str) -> Counter[str]:
    """Loads from global memory that the PTX of a kernel has, by width and type; those of a loop count once."""
    start = text.index(f".entry {name}(")
    return Counter(re.findall(r"ld\.global\.(\S+)", text[start : text.index("\n}", start)]))
