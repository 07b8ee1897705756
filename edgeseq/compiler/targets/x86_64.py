"""x86-64: from AVX2 up to AVX-512; below AVX2 the code is correct and slow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import Dot, Target, cpu_of, llvm_features

if TYPE_CHECKING:
    from devices.profile import Profile

CHECKED = (
    "sse4.2", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "popcnt", "avx512f", "avx512dq", "avx512bw",
    "avx512vl", "avx512cd", "avx512vbmi", "avx512vbmi2", "avx512vnni", "avx512bf16", "avx512fp16", "avxvnni",
)  # fmt: skip
"""Instruction sets LLVM picks for arithmetic, in the runtime's names."""


def make(profile: Profile) -> Target:
    llvm: dict[str, Any] = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": cpu_of(profile)}
    present = llvm_features(llvm)
    if "avx512f" in present and "prefer-256-bit" in present:
        llvm["mattr"] = ["-prefer-256-bit"]  # kernels are written for 16 floats
    streams, ahead = (7 if "avx512f" in present else 4), True  # eight often lie 4096 bytes apart and share cache sets
    if llvm["mcpu"].startswith("znver"):
        streams, ahead = 2, False  # the core's own prefetchers follow them, and ours keep these from it
    return Target(
        name=profile.name,
        llvm=llvm,
        shared="x86_64-linux-gnu.2.28",
        static="x86_64-linux-musl",
        features=tuple(f for f in CHECKED if f in present),
        gemm_tile=(12, 2) if "avx512f" in present else (6, 1),
        dot=_dot(present),
        streams=streams,
        ahead=ahead,
    )


def _dot(present: set[str]) -> Dot:
    if "avx512vnni" in present:
        return Dot("vnni", signed=False, tile=(6, 2))
    return Dot("avx2", signed=True, tile=(4, 1)) if "avx2" in present else Dot("plain", signed=True, tile=(1, 1))
