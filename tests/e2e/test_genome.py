"""The DNA example: its model loads, its program in C says what PyTorch says, its memory does not grow."""

from __future__ import annotations

import gzip
import math
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeseq.compiler import compile_export
from exporters import export

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "dna.py"
GENOME = Path("/usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz")


def dna() -> Any:
    spec = spec_from_file_location("dna", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fasta(folder: Path, n: int) -> tuple[Path, bytes]:
    letters = bytes(np.random.default_rng(3).choice(list(b"ACGT"), n).astype(np.uint8))
    lines = [letters[i : i + 70] for i in range(0, n, 70)]
    path = folder / "made.fna"
    path.write_bytes(b">made up\n" + b"\n".join(lines) + b"\n")
    return path, letters


def bits(letters: bytes) -> float:
    """Bits per base of the whole sequence in PyTorch, the first letter given."""
    tokens = torch.tensor([list(letters)])
    with torch.no_grad():
        logits = dna().model().eval()(tokens[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])) / math.log(2)


def test_the_letters_of_a_fasta_file_and_their_counts(tmp_path: Path) -> None:
    path, letters = fasta(tmp_path, 300)
    module = dna()
    assert module.bases(path).tobytes() == letters
    text = np.frombuffer(b"ACGT" * 500, np.uint8)
    assert module.orders(text, text, 0) == pytest.approx(2.0, abs=1e-3)
    assert module.orders(text, text, 2) < 0.01


def test_what_ships_is_small_and_speaks_bases_only() -> None:
    """Random bases cost two bits and a little more: all probability is on four letters, nothing is known of them."""
    assert dna().WEIGHTS.stat().st_size < 1_000_000
    assert 2.0 < bits(bytes(np.random.default_rng(5).choice(list(b"ACGT"), 600).astype(np.uint8))) < 2.2


@pytest.mark.skipif(not GENOME.is_file(), reason="bowtie-examples is not installed")
def test_bases_that_it_was_not_trained_on_cost_less_than_two_bits() -> None:
    lines = gzip.decompress(GENOME.read_bytes()).split(b"\n")[1:]
    assert bits(b"".join(lines)[-20000:-10000]) < 1.97


@pytest.mark.slow
def test_the_program_says_what_pytorch_says(tmp_path: Path) -> None:
    path, letters = fasta(tmp_path, 20000)
    export(f"{EXAMPLE}:model", tmp_path / "export", chunks=())
    bundle = compile_export(tmp_path / "export", "host", tmp_path / "bundle")
    compiler = ["gcc"] if shutil.which("gcc") else [sys.executable, "-m", "ziglang", "cc"]
    program = tmp_path / "genome"
    source = ROOT / "runtimes" / "c" / "examples" / "genome.c"
    subprocess.run(
        [*compiler, "-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", str(source), "-I", str(bundle),
         "-o", str(program), str(bundle / "libmodel.a"), "-pthread", "-lm"], check=True,
    )  # fmt: skip
    done = subprocess.run(
        [program, bundle / "model.edgeseq", path, "5", "15000"], check=True, capture_output=True, text=True
    )
    rows = dict(re.findall(r"^ *(\d+) bases +(\S+) bits per base", done.stdout, re.M))
    assert set(rows) == {"128", "10000", "15000"}
    for count, told in rows.items():
        assert float(told) == pytest.approx(bits(letters[5 : 5 + int(count) + 1]), abs=2e-4)
    grown = re.search(r"memory since 10000 bases: \+(\d+) KiB", done.stdout)
    assert grown and int(grown[1]) <= 64
