"""edgeseq: recurrent sequence models compiled for edge devices.

What users need, loaded on first use so that `import edgeseq` is instant and needs neither torch nor tvm:
`export`, `compile`, `verify`, `load`, `Model`, `Session`, and the errors.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgeseq.errors import EdgeseqError

if TYPE_CHECKING:
    from edgeseq.compiler import compile_export as compile
    from edgeseq.runtime import Model, Session, load
    from edgeseq.verify import verify
    from exporters import export

__version__ = "0.1.0"
__all__ = ["EdgeseqError", "Model", "Session", "__version__", "compile", "export", "load", "verify"]

_LAZY = {
    "export": ("exporters", "export"),
    "compile": ("edgeseq.compiler", "compile_export"),
    "verify": ("edgeseq.verify", "verify"),
    "load": ("edgeseq.runtime", "load"),
    "Model": ("edgeseq.runtime", "Model"),
    "Session": ("edgeseq.runtime", "Session"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edgeseq' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
