"""Export directory, or somebody else's ONNX file -> bundle. The only folder that imports tvm, behind `tvm_api`."""

from __future__ import annotations

from typing import Any

__all__ = ["ImportOptions", "Tuning", "compile_export", "compile_onnx"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(name)
