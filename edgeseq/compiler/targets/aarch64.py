"""64-bit ARM with NEON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import Dot, Target, cpu_of, llvm_features

if TYPE_CHECKING:
    from devices.profile import Profile

CHECKED = {"neon": "neon", "dotprod": "dotprod", "fullfp16": "fp16", "i8mm": "i8mm", "lse": "lse"}
"""LLVM's names of what it may use, to the runtime's names."""


def make(profile: Profile) -> Target:
    triple = "aarch64-linux-gnu"
    if profile.triple.endswith("-android"):
        triple = "aarch64-unknown-linux-android"  # all four words, or LLVM takes x18, which is the system's there
    llvm: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "mcpu": cpu_of(profile)}
    present = llvm_features(llvm)
    if "sve" in present:  # kernels are written for NEON, and some systems hide the core's SVE
        llvm["mattr"] = ["-sve"]
    dot = next((name for name in ("i8mm", "dotprod") if name in present), "plain")
    return Target(
        name=profile.name,
        llvm=llvm,
        shared="aarch64-linux-gnu.2.28",
        static="aarch64-linux-musl",
        features=tuple(ours for theirs, ours in CHECKED.items() if theirs in present),
        gemm_tile=(6, 1),
        dot=Dot(dot, signed=True, tile=(4, 1)),
        chains=2,  # eight registers; eight chains would need all 32
    )
