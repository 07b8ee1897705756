"""Comparing every stage with the one before: PyTorch, stock onnxruntime, the runtime here, the driver on a device.

`edgeseq.verify(path, ...)` is the function `verify`; the module itself can be called too, since importing anything
from here makes `edgeseq.verify` the module.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeseq.verify.chain import verify
    from edgeseq.verify.report import Report, Stage

__all__ = ["Report", "Stage", "verify"]

_LAZY = {"verify": "chain", "Report": "report", "Stage": "report"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edgeseq.verify' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"edgeseq.verify.{_LAZY[name]}"), name)


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from edgeseq.verify.chain import verify

        return verify(*args, **options)


sys.modules[__name__].__class__ = _Callable
