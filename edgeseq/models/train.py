"""Train a tiny byte-level model on one core in minutes: `python -m edgeseq.models.train mamba`.

Every family gets the same text, the same number of bytes, the same optimiser and schedule. Writes
`tiny-<family>.safetensors` (matrices in float16) and `tiny-<family>.json` (config, recipe, held-out bits per byte).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from edgeseq.models import corpus, families, family
from edgeseq.models.base import Family, SequenceModel
from edgeseq.models.source import ZOO_WEIGHTS, load_weights, seeded_rng

SAMPLE_BYTES = 16384
MISSING = "missing"
HALF_FROM = 4096  # tensors with more elements are stored in float16


@dataclass(frozen=True)
class Recipe:
    """`batch` windows of `context` bytes at random offsets of the shuffled lines; warm-up, cosine decay."""

    steps: int = 2000
    batch: int = 8
    context: int = 256
    lr: float = 3e-3
    lr_matrix: float = 4e-3
    last: float = 0.03
    warmup: int = 60
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1


def fresh_model(family: Family, seed: int) -> SequenceModel:
    """The tiny shape with seeded initial weights, parameters rewritten for training where the family asks for it."""
    c = family.tiny
    model = family.model(c).train()
    made = {*family.constants(c), *family.derived(c)}
    initial = {
        name: family.random_tensor(c, name, tuple(t.shape), seeded_rng(f"train {seed}", name))
        for name, t in model.state_dict().items()
        if name not in made
    }
    load_weights(model, family.completed(c, initial))
    model.parametrize()
    return model


def optimisers(model: SequenceModel, r: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers and of blocks they share, AdamW without decay for the rest.

    The rest: embedding, norms, biases, A, D, convolutions.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = {n: p for n, p in named if n.startswith(("layers.", "shared.")) and n.endswith("_proj.weight")}
    rest = [p for n, p in named if n not in matrices]
    return [
        torch.optim.Muon(
            matrices.values(),
            lr=r.lr_matrix,
            momentum=0.95,
            weight_decay=r.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=r.lr, betas=r.betas, weight_decay=0.0),
    ]


def schedule(step: int, r: Recipe) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `last`."""
    if step < r.warmup:
        return (step + 1) / r.warmup
    progress = (step - r.warmup) / max(1, r.steps - r.warmup)
    return r.last + (1.0 - r.last) * 0.5 * (1.0 + math.cos(math.pi * progress))


def cross_entropy(model: SequenceModel, window: Tensor) -> Tensor:
    """Mean nats per byte of window[:, 1:] given what precedes: window [B,T+1] int64."""
    return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def train(model: SequenceModel, text: np.ndarray, r: Recipe) -> float:
    """Run the recipe on a uint8 text; returns the seconds it took."""
    opts, rng, start = optimisers(model, r), np.random.default_rng(r.seed), time.monotonic()
    plans = [torch.optim.lr_scheduler.LambdaLR(opt, lambda step: schedule(step, r)) for opt in opts]
    smooth, device = 0.0, next(model.parameters()).device
    for step in range(r.steps):
        offsets = rng.integers(0, len(text) - r.context - 1, r.batch)
        window = torch.from_numpy(np.stack([text[o : o + r.context + 1] for o in offsets]).astype(np.int64))
        loss = cross_entropy(model, window.to(device))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), r.clip)
        for opt, plan in zip(opts, plans, strict=True):
            opt.step()
            plan.step()
        bits = loss.detach() / math.log(2)  # not .item(): that would wait for a GPU at every step
        smooth = bits if step == 0 else 0.98 * smooth + 0.02 * bits
        if step % 50 == 49:
            seconds = time.monotonic() - start
            print(f"step {step + 1:5d}  {smooth:.4f} bits/byte  {seconds:6.0f} s", flush=True)
    return time.monotonic() - start


@torch.no_grad()
def bits_per_byte(model: SequenceModel, text: bytes, context: int) -> float:
    """Mean bits per byte of `text`, cut into windows of `context` bytes that each start from a fresh state.

    The byte before a window (a newline before the first) is given, not scored; a ragged tail is left out.
    """
    data = np.frombuffer(b"\n" + text, np.uint8).astype(np.int64)
    count = (len(data) - 1) // context
    device = next(model.parameters()).device
    windows = np.stack([data[i * context : (i + 1) * context + 1] for i in range(count)])
    total = sum(
        cross_entropy(model, torch.from_numpy(w).to(device)).item() * len(w)
        for w in np.array_split(windows, -(-count // 16))
    )
    return total / count / math.log(2)


def stored(model: SequenceModel, without: Collection[str] = ()) -> dict[str, Tensor]:
    """What is shipped: large matrices in float16, the rest in float32; tensors that others imply are left out."""
    return {
        name: (t.half() if t.numel() > HALF_FROM else t).contiguous()
        for name, t in model.state_dict().items()
        if t.is_floating_point() and name not in without
    }


def untrained(out: Path) -> list[str]:
    """Families without weights in `out`: what an interrupted run has left to do."""
    return [name for name in families() if not (out / f"tiny-{name}.json").is_file()]


def train_family(name: str, data: Path, out: Path, recipe: Recipe, device: str, compiled: bool) -> dict[str, Any]:
    """Train `name`, write its two files into `out` and return what the second one says."""
    torch.manual_seed(recipe.seed)
    training, held = corpus.split(corpus.gloss_lines(data))
    random.Random(recipe.seed).shuffle(training)
    chosen = family(name)
    model = fresh_model(chosen, recipe.seed).to(device)
    for layer in model.layers if compiled else ():
        layer.compile(dynamic=False)  # one by one: layers of one kind share what is compiled
    seconds = train(model, np.frombuffer(b"".join(training), np.uint8), recipe)

    model.cpu().unparametrize()
    out.mkdir(parents=True, exist_ok=True)
    weights = stored(model, chosen.derived(chosen.tiny))
    save_file(weights, out / f"tiny-{name}.safetensors")
    model = chosen.model(chosen.tiny).eval()
    load_weights(model, chosen.completed(chosen.tiny, {n: t.float().numpy() for n, t in weights.items()}))
    text = b"".join(held)
    record = {
        "family": name,
        "params": chosen.param_count(chosen.tiny),
        "config": asdict(chosen.tiny),
        "recipe": asdict(recipe),
        "data": {
            "source": "WordNet 3.0 glosses (Debian wordnet-base)",
            "training_bytes": sum(map(len, training)),
            "held_out_bytes": len(text),
            "sample_bytes": SAMPLE_BYTES,
        },
        "bytes_seen": recipe.steps * recipe.batch * recipe.context,
        "compiled": compiled,
        "minutes": round(seconds / 60, 1),
        "held_out_bits_per_byte": round(bits_per_byte(model, text, recipe.context), 4),
        "sample_bits_per_byte": round(bits_per_byte(model, text[:SAMPLE_BYTES], recipe.context), 4),
    }
    (out / f"tiny-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "family", choices=[*families(), MISSING], help=f"`{MISSING}`: each that --out has no weights of"
    )
    parser.add_argument("--data", type=Path, default=Path("/usr/share/wordnet"), help="folder of WordNet's data files")
    parser.add_argument("--out", type=Path, default=ZOO_WEIGHTS)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="a torch device; the shipped weights may come from any")
    parser.add_argument("--compile", action="store_true", help="torch.compile every layer, which takes a minute or two")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in untrained(args.out) if args.family == MISSING else [args.family]:
        print(f"zoo:tiny-{name}", flush=True)
        record = train_family(name, args.data, args.out, Recipe(steps=args.steps), args.device, args.compile)
        print(json.dumps({k: record[k] for k in ("held_out_bits_per_byte", "sample_bits_per_byte", "minutes")}))


if __name__ == "__main__":
    main()
