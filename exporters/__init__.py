"""PyTorch models to ONNX step and chunk graphs, generic over families. `export` is the whole of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.pipeline import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    if name != "export":
        raise AttributeError(f"module 'exporters' has no attribute {name!r}")
    from exporters.pipeline import export  # torch loads only here

    return export
