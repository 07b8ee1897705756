"""A memory that learned to copy: bits come in, a delimiter, and what was heard is said again, from PyTorch to C.

    edgeseq export zoo:tiny-dnc -o dnc
    edgeseq compile dnc --target host -o dnc.bundle
    python docs/examples/copy_task.py run dnc.bundle

The copy task of Graves et al. 2014, section 4.1: L rows of 8 random bits, one row a step, then a step with the ninth
input at 1, then L steps of silence in which the rows have to come back. Nothing but the memory can hold them: the
controller has 64 units. `train` makes the weights that ship (one thread, below two minutes):

    python docs/examples/copy_task.py train dnc --out dnc.safetensors
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BITS = 8
LONGEST = 10  # rows of a sequence while training
BATCH = 16


def sequence(rng: np.random.Generator, rows: int, batch: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Inputs [batch, 2 rows + 1, 9] and the bits [batch, rows, 8] that the last `rows` outputs must say."""
    bits = rng.integers(0, 2, (batch, rows, BITS)).astype(np.float32)
    x = np.zeros((batch, 2 * rows + 1, BITS + 1), np.float32)
    x[:, :rows, :BITS], x[:, rows, BITS] = bits, 1
    return x, bits


def said(model: Any, x: Tensor) -> Tensor:
    """Logits of the second half, [batch, rows, 8]."""
    y, *_ = model.chunk(x, *model.initial_state(x.shape[0]))
    return y[:, x.shape[1] // 2 + 1 :]


def train(name: str, out: Path, steps: int, seed: int, rate: float) -> None:
    """Adam on the bits' cross entropy, sequences of 1 to 10 rows, the whole sequence differentiated."""
    from safetensors.numpy import save_file

    from edgeseq.models import step_families

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    record, rng, began = step_families()[name], np.random.default_rng(seed), time.monotonic()
    model: Any = record.model(record.tiny)
    for key, p in model.named_parameters():
        if p.ndim == 2 and not key.startswith("first_"):
            torch.nn.init.xavier_uniform_(p)
        elif key == "first_weights":
            torch.nn.init.normal_(p)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    for step in range(1, steps + 1):
        rows = int(rng.integers(1, min(LONGEST, 2 + step * 20 // steps) + 1))
        x, bits = (torch.from_numpy(a) for a in sequence(rng, rows, BATCH))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(said(model, x), bits)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 200 == 0:
            print(
                f"step {step}: {loss.item() / np.log(2):.4f} bits a bit, {time.monotonic() - began:.0f} s", flush=True
            )
    with torch.no_grad():
        for rows in (1, 5, 10, 16):
            x, bits = (torch.from_numpy(a) for a in sequence(rng, rows, 64))
            print(f"{rows} rows: {((said(model, x) > 0) != bits.bool()).float().mean():.4f} of the bits wrong")
    save_file({key: value.numpy() for key, value in model.state_dict().items()}, out)


def run(bundle: Path, count: int) -> None:
    """Sequences of several lengths through the compiled step: bits that come back wrong, and what a step takes."""
    import edgeseq

    rng = np.random.default_rng(1)
    with edgeseq.load(bundle, threads=1) as model, model.session() as session:
        for rows in (1, 5, 10, 16):
            wrong, began = 0, time.perf_counter()
            for _ in range(count):
                x, bits = sequence(rng, rows, 1)
                session.reset()
                y = [session.run({"x": row.reshape(1, 1, -1)})["y"][0, 0].copy() for row in x[0]]
                wrong += int(((np.stack(y[rows + 1 :]) > 0) != bits[0].astype(bool)).sum())
            spent = (time.perf_counter() - began) / (count * (2 * rows + 1))
            print(
                f"{rows:2} rows: {wrong} of {count * rows * BITS} bits wrong, {spent * 1e6:.0f} us a step from Python"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    teach = commands.add_parser("train")
    teach.add_argument("name", choices=["ntm", "dnc"])
    teach.add_argument("--out", type=Path, required=True)
    teach.add_argument("--steps", type=int, default=2400)
    teach.add_argument("--seed", type=int, default=1)
    teach.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    play = commands.add_parser("run")
    play.add_argument("bundle", type=Path)
    play.add_argument("--count", type=int, default=50)
    options = parser.parse_args()
    if options.command == "train":
        train(options.name, options.out, options.steps, options.seed, options.rate)
    else:
        run(options.bundle, options.count)


if __name__ == "__main__":
    main()
