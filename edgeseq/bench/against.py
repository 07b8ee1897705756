"""`--against NAME`: which rivals there are, what each needs, and with whom its rates are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgeseq.bench.engines import BACKENDS, Rival
from edgeseq.bench.llama_bench import NAME, LlamaEngine, Program
from edgeseq.bench.rivals import OrtEngine
from edgeseq.bench.rows import Row
from edgeseq.bench.torch_rivals import CompiledTorchEngine, TorchEngine
from edgeseq.bundle.plan import Plan
from edgeseq.errors import UsageError

READERS: dict[str, Callable[[Path, int], Rival]] = {
    "onnxruntime": OrtEngine,
    "torch": TorchEngine,
    "torch-compile": CompiledTorchEngine,
}
"""Rivals that read the export."""


def program_of(against: Sequence[str], export: Path | None, gguf: Path | None, path: Path | None) -> Program | None:
    """llama-bench and its file, if it is asked for. UsageError where a rival lacks what it needs."""
    if export is None and set(against) & set(READERS):
        raise UsageError("--against needs the weights in a form others read", "add --export DIR of the same model")
    if NAME in against:
        return Program.find(path, gguf)
    if gguf is not None or path is not None:
        raise UsageError("--gguf and --llama-bench are for --against llama-bench", f"add --against {NAME}")
    return None


def open_rivals(
    against: Sequence[str], export: Path | None, program: Program | None, plans: Sequence[Plan], threads: int
) -> list[Rival]:
    """The rivals in the order they were named, each once."""
    rivals: list[Rival] = []
    for name in dict.fromkeys(against):
        if name in READERS and export is not None:
            rivals.append(READERS[name](export, threads))
        elif program is not None:
            rivals.append(LlamaEngine(program, plans, threads))
    return rivals


def ratio_rows(rows: Sequence[Row]) -> list[Row]:
    """How many times the rate of each rival a bundle of the same model reaches, test by test, by their medians."""
    rivals = [r for r in rows if r["backends"] not in BACKENDS.values()]
    return [
        {
            "test": "ratio",
            "case": row["test"],
            "model_filename": row["model_filename"],
            "model_type": row["model_type"],
            "n_threads": row["n_threads"],
            "against": rival["backends"],
            "against_build": rival["build_commit"],
            "against_filename": rival["model_filename"],
            "against_type": rival["model_type"],
            "against_verified": rival["verified"],
            "ratio": row["median_ts"] / rival["median_ts"],
        }
        for row in rows
        if row["backends"] in BACKENDS.values()
        for rival in rivals
        if all(rival[key] == row[key] for key in ("test", "model_id"))
        if rival["n_threads"] == row["n_threads"] or row["n_gpu_layers"]
    ]
