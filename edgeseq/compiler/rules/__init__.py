"""Fusion rules, one file each: which nodes become which kernel.

A rule file ends in `RULE = Rule(ops, match)`. `match` looks at one node whose operator is in `ops` and returns a
Claim, or None when the pattern is not there. Rules are found by listing this folder, in the order of file names.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeseq.compiler.graph import Node
    from edgeseq.compiler.lowering import Lowering


@dataclass(frozen=True)
class Claim:
    """Nodes that become one call. `needs`: names it reads; `emit` appends the call and defines the outputs."""

    nodes: tuple[Node, ...]
    needs: tuple[str, ...]
    emit: Callable[[], None]


@dataclass(frozen=True)
class Rule:
    ops: tuple[str, ...]
    match: Callable[[Lowering, Node], Claim | None]


@cache
def rules_by_op() -> dict[str, list[Rule]]:
    """Every rule under each operator it looks at."""
    table: dict[str, list[Rule]] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        rule = importlib.import_module(f"{__name__}.{module}").RULE
        for op in rule.ops:
            table.setdefault(op, []).append(rule)
    return table
