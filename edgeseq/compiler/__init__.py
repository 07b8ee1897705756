"""Export directory -> bundle. The only folder that imports tvm, behind `tvm_api`."""

from __future__ import annotations

from typing import Any

__all__ = ["compile_export"]


def __getattr__(name: str) -> Any:
    if name == "compile_export":
        from .pipeline import compile_export

        return compile_export
    raise AttributeError(name)
