"""@SOURCE@, compiled for @TARGET@: `load()` opens it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import BundleError, EdgeseqError, RuntimeFailure, UsageError
from .runtime import GREEDY, Graph, Model, ModelInfo, Sampling, Session, Tensor
from .runtime import load as _load

__all__ = [
    "GREEDY", "BundleError", "EdgeseqError", "Graph", "Model", "ModelInfo", "RuntimeFailure", "Sampling", "Session",
    "Tensor", "UsageError", "load",
]  # fmt: skip


def load(threads: int | None = None, cores: Sequence[int] = ()) -> Model:
    """The model of this folder. threads: None is one per core; cores: to pin threads to."""
    return _load(Path(__file__).parent, threads, cores)
