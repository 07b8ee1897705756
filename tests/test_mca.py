"""scripts/mca.py: finds the loop that multiplies, knows what a turn reads, and says whether the cores keep up."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def mca(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "mca.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("llvm-mca-19") is None, reason="llvm-19 is not installed")
@pytest.mark.parametrize("profile", ["raspberry-pi-5", "dimensity-9300-cpu"])
def test_quantised_products_keep_up_with_the_memory(profile: str) -> None:
    done = mca(profile, "--storage", "int4,int8", "--llvm-mca", "llvm-mca-19")
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert [row[0] for row in found] == ["int4", "int4", "int8", "int8"], "LLVM's own model, then the twin's"
    for storage, model, instructions, _, products, _, _, share in found:
        assert products == "512", "a turn is a block of 32 of 16 rows"
        assert int(instructions) < 125, f"{storage}: sums or weights were spilled"
        assert float(share) >= 1, f"{storage} on {model} is slower than its memory"


def test_what_it_refuses() -> None:
    done = mca("qemu-aarch64")
    assert done.returncode == 2 and "says no clocks" in done.stderr
