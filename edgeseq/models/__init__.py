"""Model families, found by listing this folder: a module that defines `FAMILY` is one."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from edgeseq.errors import SourceError

if TYPE_CHECKING:
    from edgeseq.models.base import Family


@cache
def families() -> dict[str, Family]:
    """Every family by name, sorted."""
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        record = getattr(importlib.import_module(f"{__name__}.{module}"), "FAMILY", None)
        if record is not None:
            found[record.name] = record
    return found


def family(name: str) -> Family:
    """The family called `name`; raises SourceError that lists the known ones."""
    if name not in families():
        raise SourceError(f"There is no model family {name!r}; the families are {', '.join(families())}")
    return families()[name]
