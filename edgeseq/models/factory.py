"""`path/file.py:factory`: a module of the user's own. The file is run, as `python path/file.py` would run it."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from edgeseq.errors import EdgeseqError, SourceError, UsageError
from edgeseq.models.base import signature_of
from edgeseq.models.user import follow_protocol


def _guarded(path: Path, call: Callable[[], Any]) -> Any:
    """Run code of the user's file; what it raises becomes one sentence with the file and the line."""
    try:
        return call()
    except EdgeseqError:
        raise
    except SyntaxError as error:
        where = Path(error.filename or path)
        raise SourceError(f"{where}, line {error.lineno}: SyntaxError: {error.msg}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
        line = f", line {lines[-1]}" if lines else ""
        first = (str(error).splitlines() or [""])[0]
        raise SourceError(f"{path}{line}: {type(error).__name__}: {first}") from None


def make_module(path: Path, name: str) -> nn.Module:
    """Call `name()` of the file and check that it follows the token protocol or has named inputs and outputs."""
    path = path.resolve()
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"edgeseq_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.path.insert(0, str(path.parent))
    sys.modules[spec.name] = module
    try:
        _guarded(path, lambda: loader.exec_module(module))
        factory = getattr(module, name, None)
        if not callable(factory):
            raise UsageError(f"{path} has no function {name!r}")
        made = _guarded(path, factory)
        if not isinstance(made, nn.Module):
            raise SourceError(f"{path}: {name}() returned {type(made).__name__}, not a torch.nn.Module")
        made = follow_protocol(made)
        _guarded(path, lambda: signature_of(made, 1, 1))
    finally:
        sys.path.remove(str(path.parent))
    return made.eval()
