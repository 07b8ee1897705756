"""A genome through a recurrent model, base by base: what a million steps cost, and what the model learned of DNA.

    python docs/examples/dna.py genome ecoli.fna            # Escherichia coli 536, of Debian's bowtie-examples, by apt
    edgeseq export docs/examples/dna.py:model -o dna
    edgeseq compile dna --target host -o dna.bundle
    cc -std=c99 -O2 runtimes/c/examples/genome.c -I dna.bundle -o genome dna.bundle/libmodel.a -pthread -lm
    ./genome dna.bundle/model.edgeseq ecoli.fna 3938920     # from there on: the million bases it was not trained on

The model is a Mamba of two layers over bytes, 98 240 parameters. It was trained on the first 3 938 920 bases, in
windows of 512 that start from a fresh state; what ships as dna.safetensors was made by (some minutes on one core)

    python docs/examples/dna.py train ecoli.fna
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeseq.models.mamba import FAMILY, MambaConfig
from edgeseq.models.source import load_weights, seeded_rng

CONFIG = MambaConfig(256, 64, 2, 128, d_state=8)
WEIGHTS = Path(__file__).with_suffix(".safetensors")
HELD_OUT = 1_000_000
PACKAGE = "bowtie-examples"


def model() -> nn.Module:
    """The trained model."""
    from safetensors.numpy import load_file

    made = FAMILY.model(CONFIG)
    load_weights(made, {name: array.astype(np.float32) for name, array in load_file(WEIGHTS).items()})
    return made


def genome(out: Path) -> None:
    """Fetch the package with apt and write its genome, a FASTA file of 5 MB; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        (found,) = Path(folder).rglob("*.fna.gz")
        with gzip.open(found) as source, out.open("wb") as target:
            shutil.copyfileobj(source, target)


def bases(path: Path) -> NDArray[np.uint8]:
    """The letters of a FASTA file, without its header lines."""
    lines = path.read_bytes().split(b"\n")
    return np.frombuffer(b"".join(line for line in lines if not line.startswith(b">")), np.uint8)


def orders(text: NDArray[np.uint8], held: NDArray[np.uint8], order: int) -> float:
    """Bits per base of `held` by counts of what followed the last `order` bases in `text`."""
    code = np.zeros(256, np.int64)
    code[list(b"ACGT")] = range(4)

    def keys(x: NDArray[np.uint8]) -> NDArray[np.int64]:
        digits = code[x]
        return sum(digits[i : len(x) - order + i] * 4 ** (order - i) for i in range(order + 1))

    counts = np.bincount(keys(text), minlength=4 ** (order + 1)).reshape(-1, 4) + 1.0 / 16
    p = counts / counts.sum(1, keepdims=True)
    return float(-np.log2(p.reshape(-1)[keys(held)]).mean())


def train(path: Path, out: Path, steps: int) -> None:
    from safetensors.numpy import save_file

    from edgeseq.models.train import Recipe, bits_per_byte
    from edgeseq.models.train import train as fit

    torch.set_num_threads(1)
    torch.manual_seed(1)
    text = bases(path)
    text, held = text[:-HELD_OUT], text[-HELD_OUT:]
    for order in (0, 2, 4, 6, 8):
        print(f"counts of the last {order} bases: {orders(text, held, order):.4f} bits per base", flush=True)
    made = FAMILY.model(CONFIG).train()
    shapes = {name: tuple(t.shape) for name, t in made.state_dict().items()}
    load_weights(made, {n: FAMILY.random_tensor(CONFIG, n, s, seeded_rng("dna", n)) for n, s in shapes.items()})
    made.parametrize()
    fit(made, text, Recipe(steps=steps, batch=16, context=512))
    made.unparametrize()
    made.eval()
    print(f"held-out windows of 512: {bits_per_byte(made, held[:65536].tobytes(), 512):.4f} bits per base")
    small = {n: t.half() if t.numel() > 4096 else t for n, t in made.state_dict().items()}
    save_file({name: t.contiguous().numpy() for name, t in small.items()}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    fetch = commands.add_parser("genome")
    fetch.add_argument("out", type=Path)
    teach = commands.add_parser("train")
    teach.add_argument("fasta", type=Path)
    teach.add_argument("--out", type=Path, default=WEIGHTS)
    teach.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    if options.command == "genome":
        genome(options.out)
    else:
        train(options.fasta, options.out, options.steps)
        print(f"{options.out}: {options.out.stat().st_size} bytes, {FAMILY.param_count(CONFIG)} parameters")


if __name__ == "__main__":
    main()
