"""llama.cpp as a rival: its own `llama-bench`, one process for each repetition, on a GGUF file of the same model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeseq.bench.engines import Rival
from edgeseq.bundle.plan import Plan
from edgeseq.errors import EdgeseqError, UsageError
from edgeseq.spec import Manifest
from edgeseq.verify.report import Array

NAME = "llama-bench"
TIMEOUT = 3600.0
BUILD_HINT = "build llama.cpp's target llama-bench, and name the program with --llama-bench PATH"
COLUMNS: dict[str, type] = {
    "build_commit": str, "build_number": int, "cpu_info": str, "gpu_info": str, "model_type": str, "model_size": int,
    "model_n_params": int, "n_batch": int, "n_ubatch": int, "n_threads": int, "type_k": str, "type_v": str,
    "n_gpu_layers": int, "n_prompt": int, "n_gen": int, "n_depth": int, "samples_ns": list,
}  # fmt: skip
"""What is read of its JSON; whatever else a version prints is its own."""
OWN = ("build_commit", "build_number", "gpu_info", "model_type", "model_size", "model_n_params", "n_batch", "n_ubatch",
       "type_k", "type_v", "n_gpu_layers")  # fmt: skip
"""The columns of a row that it fills in."""


@dataclass(frozen=True)
class Program:
    """Where llama-bench is, and the GGUF file that it runs."""

    path: str
    gguf: Path

    @staticmethod
    def find(path: Path | None, gguf: Path | None) -> Program:
        """Check what the user named; UsageError for what is missing."""
        if gguf is None:
            raise UsageError("--against llama-bench needs the same model as GGUF", "add --gguf FILE; "
                             "scripts/gguf.py makes one with llama.cpp's converter")  # fmt: skip
        if not gguf.is_file():
            raise UsageError(f"{gguf} is not a file", "name a .gguf file, which scripts/gguf.py makes")
        found = shutil.which(NAME) if path is None else str(path.absolute())
        if found is None:
            raise UsageError("there is no llama-bench on PATH", BUILD_HINT)
        if not os.access(found, os.X_OK) or Path(found).is_dir():
            raise UsageError(f"{path} is not a program", BUILD_HINT)
        return Program(found, gguf)

    def run(self, prompt: int, generate: int, depth: int, threads: int, gpu: bool) -> dict[str, Any]:
        """One test, once, after its own warm-up: the columns of its JSON. Everything else is llama-bench's default."""
        numbers = {"-p": prompt, "-n": generate, "-d": depth, "-t": threads, "-ngl": 99 if gpu else 0, "-r": 1}
        where = [] if gpu else ["-dev", "none"]
        command = [self.path, "-m", str(self.gguf), "-o", "json", *where]
        command += [text for option, number in numbers.items() for text in (option, str(number))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
        except OSError as error:
            raise UsageError(f"{self.path} does not start: {error.strerror}", BUILD_HINT) from None
        except subprocess.TimeoutExpired:
            raise EdgeseqError(f"{self.path} took more than {TIMEOUT:.0f} seconds", "measure less deep") from None
        if done.returncode:
            why = _last_error(done.stderr) or f"exit code {done.returncode}"
            raise EdgeseqError(f"llama-bench fails on {self.gguf}: {why}", f"run it by hand: {' '.join(command)}")
        row = _only_row(done.stdout, command)
        for name, wanted in (("n_prompt", prompt), ("n_gen", generate), ("n_depth", depth), ("n_threads", threads)):
            if row[name] != wanted:
                raise EdgeseqError(f"llama-bench was asked for {name} {wanted} and measured {row[name]}")
        return row


def _last_error(text: str) -> str:
    """The last line that says what is wrong, of a log that goes on after it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (said or lines or [""])[-1][:300]


def _only_row(text: str, command: list[str]) -> dict[str, Any]:
    hint = f"this version of llama-bench may be too old or too new; run it by hand: {' '.join(command)}"
    try:
        rows = json.loads(text)
    except ValueError:
        raise EdgeseqError(f"llama-bench printed no JSON, but {text.strip()[:60]!r}", hint) from None
    if not isinstance(rows, list) or len(rows) != 1 or not isinstance(rows[0], dict):
        raise EdgeseqError("llama-bench did not print one measurement", hint)
    (row,) = rows
    for name, kind in COLUMNS.items():
        if type(row.get(name)) is not kind:
            raise EdgeseqError(f"llama-bench printed {name} as {row.get(name)!r:.40}", hint)
    if len(row["samples_ns"]) != 1 or type(row["samples_ns"][0]) is not int or row["samples_ns"][0] <= 0:
        raise EdgeseqError(f"llama-bench printed the times {row['samples_ns']!r:.40} for one repetition", hint)
    return row


class LlamaEngine(Rival):
    """One GGUF file. A repetition is a process: it loads the model, reads up to the depth, warms up and is timed once.

    Its logits cannot be asked for, so nothing is verified; its number of parameters must be a bundle's.
    """

    def __init__(self, program: Program, plans: Sequence[Plan], threads: int) -> None:
        self.program, self.on_gpu = program, all(plan.backend != "cpu" for plan in plans)
        first = program.run(0, 1, 0, threads, self.on_gpu)
        manifest = _model_of(first, plans, program.gguf)
        super().__init__(str(program.gguf), NAME, threads, manifest, {name: first[name] for name in OWN})

    def place(self, depth: int) -> None:
        """Each process reads up to the depth by itself, outside what it times."""
        self._depth, self.placed = depth, "prefill" if depth else "fresh"

    def restore(self) -> None:
        """Each process starts anew."""

    def prefill(self, ids: Array) -> int:
        return self._timed(len(ids), 0)

    def decode(self, n: int) -> list[int]:
        return [self._timed(0, n)]

    def _timed(self, prompt: int, generate: int) -> int:
        row = self.program.run(prompt, generate, self._depth, self.threads, self.on_gpu)
        ns: int = row["samples_ns"][0]
        return ns


def _model_of(row: dict[str, Any], plans: Sequence[Plan], gguf: Path) -> Manifest:
    """The model with as many parameters as the file has. UsageError for none, or more than one."""
    found = {p.manifest.model_id: p.manifest for p in plans if p.manifest.params == row["model_n_params"]}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise UsageError(f"{gguf} is as large as {len(found)} of the models", "measure one of them at a time")
    sizes = ", ".join(str(plan.manifest.params) for plan in plans)
    raise UsageError(
        f"{gguf} has {row['model_n_params']} parameters, what it would be compared with {sizes}",
        "make the GGUF of the same source with scripts/gguf.py",
    )
