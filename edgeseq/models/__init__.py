"""Model families, found by listing this folder: a module that defines `FAMILY` is one."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from edgeseq.errors import SourceError

if TYPE_CHECKING:
    from edgeseq.models.base import Family
    from edgeseq.models.step_family import StepFamily


def _found() -> dict[str, Any]:
    modules = (
        importlib.import_module(f"{__name__}.{m}") for m in sorted(m.name for m in pkgutil.iter_modules(__path__))
    )
    records = (getattr(module, "FAMILY", None) for module in modules)
    return {record.name: record for record in records if record is not None}


@cache
def families() -> dict[str, Family]:
    """Every family of token models by name, sorted."""
    from edgeseq.models.base import Family

    return {name: record for name, record in _found().items() if isinstance(record, Family)}


@cache
def step_families() -> dict[str, StepFamily]:
    """Every family of models with named inputs and outputs by name, sorted."""
    return {name: record for name, record in _found().items() if name not in families()}


def family(name: str) -> Family:
    """The family of token models called `name`; raises SourceError that lists the known ones."""
    if name not in families():
        raise SourceError(f"There is no model family {name!r}; the families are {', '.join(families())}")
    return families()[name]
