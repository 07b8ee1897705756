"""The operator domain `ai.edgeseq`: one file per operator, each ending in the constant `OP`.

An operator is found by its file name; there is no list to edit. `standard.py` holds the numpy references of the
standard ONNX operators in the exact form in which the exporter uses them.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from edgeseq.ops.definition import DOMAIN, ONNX_OPSET, VERSION, Op


@cache
def all_ops() -> dict[str, Op]:
    """Every operator of the domain by its ONNX name, in the order of the file names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = (getattr(importlib.import_module(f"{__name__}.{name}"), "OP", None) for name in names)
    return {op.name: op for op in found if isinstance(op, Op)}


def register_all() -> None:
    """Register every operator's schema with onnx (checker and shape inference); doing it twice is harmless."""
    for op in all_ops().values():
        op.register()


__all__ = ["DOMAIN", "ONNX_OPSET", "VERSION", "Op", "all_ops", "register_all"]
