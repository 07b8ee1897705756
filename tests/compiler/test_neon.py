"""Products on 64-bit ARM, emulated: plain NEON, dotprod and i8mm, one token and chunks of every odd shape."""

from __future__ import annotations

from typing import Any

import pytest

from edgeseq.compiler.kernels._neon import SPAN
from edgeseq.compiler.kernels.linear_q import LinearQ

from .library import EmulatedLibrary, refs
from .test_kernels import named
from .test_quantised import check_product

CPUS = {"plain": "cortex-a72", "dotprod": "cortex-a76", "i8mm": "cortex-x4"}
"""Instruction sets by LLVM's name of a core that has no more of them."""
PROFILE = 'description = "one core"\ntriple = "aarch64-linux-gnu"\ncpu = "{}"\n'
SHAPES: list[dict[str, Any]] = [
    {"T": 1, "M": 33, "K": 70, "bias": True, "residual": True, "ldr": 35, "act": "silu"},
    {"T": 1, "M": 112, "K": 160, "streams": 2, "ahead": True},
    {"T": 5, "M": 50, "K": 97, "bias": True, "residual": True, "ldr": 50, "tile": (4, 1)},
    {"T": SPAN + 3, "M": 16, "K": 64, "tile": (4, 1)},
    {"T": 6, "M": 34, "K": 64, "tile": (3, 2)},
    {"T": 2 * SPAN, "M": 16, "K": 128, "tile": (6, 1)},
]


def products(isa: str) -> list[LinearQ]:
    """Plain products need no more than one shape of each kind: the rest is shared with other CPUs' plain code."""
    shapes = SHAPES if isa != "plain" else SHAPES[::2][:2]
    return [LinearQ(bits=bits, isa=isa, **shape) for bits in (4, 8) for shape in shapes]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EmulatedLibrary]:
    made = {}
    for isa, cpu in CPUS.items():
        folder = tmp_path_factory.mktemp(isa)
        (folder / "core.toml").write_text(PROFILE.format(cpu))
        made[isa] = EmulatedLibrary(folder, refs(products(isa)), str(folder / "core.toml"))
    return made


@named([p for isa in CPUS for p in products(isa)])
def test_product(libraries: dict[str, EmulatedLibrary], p: LinearQ) -> None:
    check_product(libraries[p.isa], p, p.M)
