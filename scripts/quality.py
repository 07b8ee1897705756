"""What rounding costs: each storage of a model's matrices, in PyTorch, on onnxruntime and in the runtime here.

    python scripts/quality.py zoo:tiny-mamba zoo:tiny-retnet zoo:tiny-transformer
    python scripts/quality.py zoo:mamba-130m --tokens 256
    python scripts/quality.py zoo:tiny-mamba --formats "int4,int4 head too,int4 uncalibrated,int4 unsearched"
    python scripts/quality.py zoo:tiny-mamba zoo:tiny-gpt2 --summary

Byte-level models: bits per byte of the held-out sample that ships with the tiny models, in windows of 256 bytes that
each start from a fresh state with the byte before them given. Every model: mean divergence KL(reference || stored) in
nats per token, and how often both choose the same likeliest token; the reference is the runtime at fp32, on the
sample or, for other models, on seeded random tokens. PyTorch and onnxruntime compute with the weights as stored and
float32 activations; the runtime rounds the activations of quantised products to int8. `--summary` prints one row a
model, its bits per byte in the runtime.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import edgeseq
from edgeseq.manifest import load_manifest
from edgeseq.models.source import ZOO_WEIGHTS, open_source
from exporters import export, golden, quantise, rounding
from exporters.ort_check import OrtModel

Array = NDArray[Any]
WINDOW = 256
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4"},
    "int4 head too": {"quant": "int4"},
    "int4 uncalibrated": {"quant": "int4", "calibrate": 0},
    "int4 calibrated": {"quant": "int4", "calibrate": 4096},
    "int4 unsearched": {"quant": "int4", "calibrate": 0},
}
SUMMARY = ("fp32", "fp16", "bf16", "int8", "int4")
USUAL = ("fp32", "fp16", "bf16", "int8", "int4", "int4 uncalibrated")
WITHOUT: dict[str, tuple[Any, str, Any]] = {
    "int4 head too": (quantise, "HEAD_SHARE", 0.0),
    "int4 unsearched": (rounding, "GRID", (8.0,)),
}
"""What the exporter leaves out for a format, to see what it is worth: module, name, value."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--tokens", type=int, default=16384, help="how much of the sample, or how many random tokens")
    parser.add_argument("--formats", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--summary", action="store_true", help="byte-level models: one row each, bits in the runtime")
    parser.add_argument("--work", type=Path, help="keep exports and bundles here")
    options = parser.parse_args()
    usual = SUMMARY if options.summary else USUAL
    wanted = options.formats.split(",") if options.formats else usual
    columns = ("matrices", "weights, bytes", "PyTorch", "onnxruntime", "runtime", "KL, nats", "same choice")
    _print_row("model", *(wanted if options.summary else columns))
    _print_row(*["---"] * (len(wanted if options.summary else columns) + 1))
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for source in options.sources:
            (_summary if options.summary else _table)(source, wanted, options.tokens, work)


def _print_row(*cells: str) -> None:
    print("|" + "|".join(c if c == "---" else f" {c} " for c in cells) + "|", flush=True)


def _exported(source: str, name: str, work: Path) -> tuple[Path, Path]:
    """Folders of the export and of the bundle, made where they do not exist."""
    folder = work / f"{source.replace(':', '-').replace('/', '-')}-{name.replace(' ', '-')}"
    if not (folder / "manifest.json").is_file():
        with _left_out(name):
            export(source, folder, chunks=(), context=WINDOW, **FORMATS[name])
    bundle = folder.with_suffix(".bundle")
    if not bundle.is_dir():
        edgeseq.compile(folder, "host", bundle)
    return folder, bundle


def _summary(source: str, wanted: Sequence[str], tokens: int, work: Path) -> None:
    windows, bits = _sample(tokens), []
    for name in wanted:
        with edgeseq.load(_exported(source, name, work)[1]) as model:
            bits.append(_bits(_log_probabilities(model.session(), windows), windows))
    _print_row(f"`{source}`", *(f"{b:.4f}" for b in bits))


def _table(source: str, wanted: Sequence[str], tokens: int, work: Path) -> None:
    reference: Array | None = None
    for name in ("fp32", *(f for f in wanted if f != "fp32")):
        folder, bundle = _exported(source, name, work)
        text = load_manifest(folder).tokenizer == "bytes"
        windows = _sample(tokens) if text else _random_windows(tokens, load_manifest(folder).vocab_size)
        with edgeseq.load(bundle) as model:
            ours = _log_probabilities(model.session(), windows)
        reference = ours if reference is None else reference
        figures = ["", "", ""]
        if text:
            with_torch = _bits(_torch_log_probabilities(source, folder, windows), windows)
            with_ort = _bits(_log_probabilities(OrtModel(folder, 1).session(), windows), windows)
            figures = [f"{bits:.4f}" for bits in (with_torch, with_ort, _bits(ours, windows))]
        divergence = float((np.exp(reference) * (reference - ours)).sum(-1).mean())
        same = float((reference.argmax(-1) == ours.argmax(-1)).mean())
        size = (folder / "weights.safetensors").stat().st_size
        _print_row(f"`{source}`", name, str(size), *figures, f"{divergence:.5f}", f"{same:.4f}")


@contextmanager
def _left_out(name: str) -> Iterator[None]:
    module, constant, value = WITHOUT.get(name, (None, "", None))
    kept = getattr(module, constant, None)
    if module is not None:
        setattr(module, constant, value)
    try:
        yield
    finally:
        if module is not None:
            setattr(module, constant, kept)


def _sample(count: int) -> Array:
    """Windows [n,257]: the byte before, then 256 to predict."""
    data = np.frombuffer(b"\n" + (ZOO_WEIGHTS / "held-out.txt").read_bytes(), np.uint8).astype(np.int64)
    n = min(count, len(data) - 1) // WINDOW
    return np.stack([data[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(n)])


def _random_windows(count: int, vocabulary: int) -> Array:
    return np.random.default_rng(1).integers(0, vocabulary, (-(-count // WINDOW), min(count, WINDOW) + 1))


def _log_probabilities(session: Any, windows: Array) -> Array:
    """log p [windows,256,V] of the token after each, from a stream with reset() and step()."""
    rows = []
    for window in windows:
        session.reset()
        rows.append(np.stack([session.step(int(token)) for token in window[:-1]]))
    return _normalised(np.stack(rows))


def _torch_log_probabilities(source: str, folder: Path, windows: Array) -> Array:
    model = open_source(source).build("meta").eval()
    golden.load(model, folder / "weights.safetensors")
    with torch.inference_mode():
        parts = [
            model(torch.from_numpy(part[:, :-1])).numpy() for part in np.array_split(windows, -(-len(windows) // 16))
        ]
    return _normalised(np.concatenate(parts))


def _normalised(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _bits(log_p: Array, windows: Array) -> float:
    return float(-np.take_along_axis(log_p, windows[:, 1:, None], -1).mean() / math.log(2))


if __name__ == "__main__":
    main()
